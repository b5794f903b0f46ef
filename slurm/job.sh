# shellcheck shell=bash
# What sbatch.sh and pipeline.sh share: the job's step, its checks, its end. Sourcing this file
# defines functions and does nothing else; conf/arguments.sh must be sourced first, and SCRIPT_DIR
# be the repository's folder. Variables are explained in slurm/README.md.

# shellcheck source=slurm/container.sh
source "$SCRIPT_DIR/slurm/container.sh"

# Exit code with which a training stage says that it saved in the middle, after SIGUSR1 or SIGTERM.
REQUEUE_CODE=75
# What srun leaves with if SIGTERM came before the stage could note it.
ENDED_EARLY=143
# Exit code of the ranks that see another one gone.
LOST_RANK_CODE=69
# Times in a row that a job may end with nothing saved: one whose time limit is shorter than its
# start would otherwise be queued for ever.
IDLE_STARTS=3
# Stages that go on from what they saved.
RESUMABLE=(eagle3.sh distill.sh)
# Stages that share their work among copies of the model.
SHARING=(quantize.sh mmlu.sh eagle3.sh distill.sh extract_features.sh generate.sh validate.sh)

# in_batch_script: whether this shell is a job's batch script (an salloc's shell is not).
in_batch_script() {
  [[ -n "${SLURM_JOB_ID:-}" && -z "${SLURM_STEP_ID:-}" && "${SLURM_TASK_PID:-}" == "$$" ]]
}

# take_words WORDS...: OPTIONS, what comes before the first <stage>.sh, and STAGE_LINE, the rest. A
# single word with spaces is the whole line, as in Megatron-LM's sbatch.sh.
take_words() {
  OPTIONS=() STAGE_LINE=()
  while (($# > 0)) && [[ ! "$1" =~ ^[a-z0-9_]+\.sh($|[[:space:]]) ]]; do
    OPTIONS+=("$1")
    shift
  done
  (($# > 0)) || fail "slurm/sbatch.sh ${OPTIONS[*]}" "no stage is named" \
    "bash slurm/sbatch.sh --nodes=1 convert.sh <conf>"
  STAGE_LINE=("$@")
  if (($# == 1)); then
    STAGE_LINE=()
    split_words STAGE_LINE "$1" "the stage's line"
  fi
  [[ -f "$SCRIPT_DIR/${STAGE_LINE[0]}" ]] || fail "stage ${STAGE_LINE[0]}" \
    "there is no $SCRIPT_DIR/${STAGE_LINE[0]}" "one of: $(stage_names | paste -sd ' ')"
}

stage_names() {
  find "$SCRIPT_DIR" -maxdepth 1 -name '*.sh' ! -name quickstart.sh -printf '%f\n' | sort
}

# requested PATTERN: the value of an sbatch option, from OPTIONS or else from sbatch.sh itself. The
# pattern matches the option's names; the value follows as =VALUE or as the next word.
requested() {
  local pattern=$1 index value='' word
  local words=("${OPTIONS[@]}")
  while read -r word; do words=("$word" "${words[@]}"); done \
    < <(sed -n 's/^#SBATCH \(--[^ ]*\).*/\1/p' "$SCRIPT_DIR/slurm/sbatch.sh")
  for index in "${!words[@]}"; do
    word=${words[index]}
    if [[ "$word" =~ ^($pattern)$ ]]; then
      value=${words[index + 1]:-}
    elif [[ "$word" =~ ^($pattern)=?([^[:space:]]+)$ ]]; then
      value=${BASH_REMATCH[-1]}
    fi
  done
  echo "${value##*:}"
}

# submit_job WORDS...: check what can be checked here, then hand the job to sbatch.
submit_job() {
  take_words "$@"
  local gpus processes work
  NNODES=$(requested '--nodes|-N')
  [[ "$NNODES" =~ ^[1-9][0-9]*$ ]] || fail "--nodes=$NNODES" "a fixed number of nodes is needed" \
    "--nodes=2"
  gpus=$(requested '--gpus-per-node|--gres')
  export NNODES GPUS_PER_NODE=${gpus:-0}
  choose_copies
  processes=$(MLM_LAUNCH=count bash "$SCRIPT_DIR/${STAGE_LINE[0]}" "${STAGE_LINE[@]:1}")
  if ((GPUS_PER_NODE * NNODES > processes)); then
    echo "note: ${STAGE_LINE[0]%.sh} uses $processes of $((GPUS_PER_NODE * NNODES)) GPUs" >&2
  fi
  choose_style
  local line=(sbatch "${OPTIONS[@]}" "$SCRIPT_DIR/slurm/sbatch.sh" "${STAGE_LINE[@]}")
  if [[ " ${STAGE_LINE[*]} ${MLM_EXTRA_ARGS:-} " == *" --dry-run "* ]]; then
    work=$(read_set_up && work_folder)
    MLM_WORK_DIR=$work bash "$SCRIPT_DIR/${STAGE_LINE[0]}" "${STAGE_LINE[@]:1}"
    (
      read_set_up
      make_step "$processes"
      show "job step" "${STEP[@]}"
    )
    show "submission" "${line[@]}"
    return
  fi
  check_here
  unset NNODES GPUS_PER_NODE # the job asks SLURM
  [[ "${DP:-}" != all ]] || unset DP
  export POST_TRAINING_ROOT=$SCRIPT_DIR
  exec "${line[@]}"
}

# show NAME WORDS...: a line of --dry-run's table, without what --dry-run itself adds.
show() {
  local name=$1 word text=''
  shift
  for word in "$@"; do
    [[ "$word" == --dry-run ]] || text+=" $(printf '%q' "$word")"
  done
  printf '%-13s%s\n' "$name" "$text"
}

# check_here: the stage's own checks, where this machine has what they need. A login node whose
# jobs run in a container often has not.
check_here() {
  if [[ -n "${CONTAINER_IMAGE:-}" ]]; then
    (STEP=() && enter_container /workspace/nmm-sandbox)
    echo "note: the stage's other checks run in the job, inside the container" >&2
    return
  fi
  local work
  work=$(read_set_up && work_folder)
  MLM_WORK_DIR=$work MLM_LAUNCH=check bash "$SCRIPT_DIR/${STAGE_LINE[0]}" "${STAGE_LINE[@]:1}"
}

# work_folder: nodes share a folder, and a machine's temporary folder is no such one.
work_folder() {
  echo "${MLM_WORK_DIR:-${USER_FSW:-${SLURM_SUBMIT_DIR:-$PWD}}/megatron_workspace}"
}

# make_step PROCESSES: STEP, the srun line that runs the stage.
make_step() {
  local processes=$1 tasks=$NNODES
  local together=(--kill-on-bad-exit=1)
  # Ranks that have saved leave one by one, and none may be killed on its way out.
  if requeues; then together=(--kill-on-bad-exit=0 --wait=45); fi
  # One task per GPU where LAUNCH_SCRIPT starts one process; one torchrun per node otherwise.
  [[ -z "${LAUNCH_SCRIPT:-}" ]] || tasks=$processes
  STEP=(srun "--nodes=$NNODES" "--ntasks=$tasks" "--ntasks-per-node=$((tasks / NNODES))"
    "${together[@]}" --cpu-bind=none --overcommit)
  local folder=$SCRIPT_DIR
  if [[ -n "${CONTAINER_IMAGE:-}" ]]; then
    folder=/workspace/nmm-sandbox
    enter_container "$folder"
  fi
  STEP+=(bash "$folder/${STAGE_LINE[0]}" "${STAGE_LINE[@]:1}")
}

# run_job WORDS...: the batch script: check the layout, run the step, report its end.
run_job() {
  local processes code=0
  take_words "$@"
  SAVE_ASKED='' STEP_PID=''
  trap near_the_limit USR1
  # SLURM kills what is left after KillWait: time enough to see how the step ended.
  trap 'report "ended by SIGTERM: cancelled, preempted or out of time"' TERM
  report "started on $SLURM_JOB_NODELIST"
  read_set_up
  unset SANDBOX_ENV_SETUP MLM_ENV_SETUP # their variables are exported now
  # After a node's failure, too, SLURM starts only such a job again.
  if requeues; then scontrol update "JobId=$SLURM_JOB_ID" Requeue=1; fi
  choose_style
  export NNODES=$SLURM_JOB_NUM_NODES GPUS_PER_NODE=${SLURM_GPUS_ON_NODE:-0}
  choose_copies
  MLM_WORK_DIR=$(work_folder)
  export MLM_WORK_DIR
  processes=$(MLM_LAUNCH=count bash "$SCRIPT_DIR/${STAGE_LINE[0]}" "${STAGE_LINE[@]:1}") ||
    finish $?
  make_step "$processes"
  [[ -z "$SAVE_ASKED" ]] || finish "$REQUEUE_CODE"
  "${STEP[@]}" &
  STEP_PID=$!
  # A trapped signal interrupts wait: go on until the step itself has ended.
  while :; do
    code=0
    wait "$STEP_PID" || code=$?
    kill -0 "$STEP_PID" 2>/dev/null || break
  done
  finish "$code"
}

# requeues: whether the job is to be queued again when its stage has saved in the middle.
requeues() {
  [[ -n "${MLM_REQUEUE:-}" ]] && resumable
}

# choose_style: torchrun gives its processes 30 s to save, and does not pass their exit code on. What
# is to be queued again runs as one task per GPU: srun sends it signals and gets its code.
choose_style() {
  if requeues; then export LAUNCH_SCRIPT=${LAUNCH_SCRIPT:-python}; fi
}

# choose_copies: a job's nodes are its own, so what can use all their GPUs does.
choose_copies() {
  if [[ " ${SHARING[*]} " == *" ${STAGE_LINE[0]} "* ]]; then export DP=${DP:-all}; fi
}

resumable() {
  [[ " ${RESUMABLE[*]} " == *" ${STAGE_LINE[0]} "* ]]
}

# near_the_limit: SLURM says that the time is nearly over (--signal=B:USR1@seconds).
near_the_limit() {
  if resumable; then
    SAVE_ASKED=1
    report "the time limit is near: the stage is asked to save"
    if [[ -n "$STEP_PID" ]]; then keep_asking & fi
  else
    report "the time limit is near; ${STAGE_LINE[0]} cannot go on later and starts anew next time" \
      "(quantize's --auto-quantize-checkpoint and prune's --prune-intermediate-ckpt keep scores)"
  fi
}

# keep_asking: srun passes the signal on to every task. One that has only just started ignores it,
# so it is sent until the step has ended.
keep_asking() {
  while kill -USR1 "$STEP_PID" 2>/dev/null; do sleep 5; done
}

# finish CODE: report how the step ended, queue again what goes on later, and leave.
finish() {
  local code=$1 why
  if ((code == 0)); then
    report "finished after $SECONDS s"
    exit 0
  fi
  case "$code" in
    "$REQUEUE_CODE" | "$ENDED_EARLY" | "$LOST_RANK_CODE") if requeues; then queue_again "$code"; fi ;;
  esac
  if ((code == REQUEUE_CODE)) || { [[ -n "$SAVE_ASKED" ]] && (($(idle_starts) == 0)); }; then
    why="It was asked to end: the same command goes on from what was saved."
  else
    why=$(reason)
  fi
  report "FAILED with exit code $code after $SECONDS s on $SLURM_JOB_NODELIST; jobs that wait for" \
    "it are cancelled. $why"
  exit "$code"
}

# queue_again CODE: put the job back into the queue, and leave; returns where that is not to be.
queue_again() {
  local idle state what=saved
  # A job that somebody cancels saves too, and is not to come back.
  state=$(scontrol --oneliner show job "$SLURM_JOB_ID" | sed 's/.*JobState=\([A-Z]*\).*/\1/')
  [[ "$state" == RUNNING ]] || return 0
  idle=$(idle_starts)
  if ((idle >= IDLE_STARTS)); then
    report "ended $IDLE_STARTS times in a row before anything was saved: raise --time, or lower the" \
      "seconds of --signal or --save-interval"
    return
  fi
  ((idle == 0)) || what="ended before training began"
  (($1 != LOST_RANK_CODE)) || what="a rank was lost"
  report "$what after $SECONDS s${SAVE_ASKED:+, before the time limit}; queued again"
  trap 'exit 0' TERM # SLURM ends this script
  scontrol requeue "$SLURM_JOB_ID" || return 0
  sleep 60 &
  wait $!
}

# idle_starts: how often in a row the job ended before anything was saved, from its log.
idle_starts() {
  local log
  log=$(log_file)
  [[ -r "$log" ]] || log=/dev/null
  awk '/stage is asked to save|asked to end before its training|: Terminated$| is lost$/ { ended = 1 }
    /: started on / { count += ended; ended = 0 }
    /interrupted, and saved|saved iteration/ { count = ended = 0 }
    END { print count + ended }' "$log"
}

# log_file: where the job's output goes.
log_file() {
  scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *StdOut=//p'
}

# reason: the first error in the job's log, else its last lines.
reason() {
  local log
  log=$(log_file)
  [[ -r "$log" ]] || return 0
  echo "From $log:"
  # A stage's own message, else the last line of a traceback.
  if ! grep --max-count=1 --after-context=2 '^error: ' "$log" &&
    ! grep --max-count=1 -E '^(\[rank[0-9]+\]: )?[A-Za-z_.]+(Error|Exception)\b' "$log"; then
    tail -n 5 "$log"
  fi | sed 's/^/    /'
}

# report WORDS...: a line in the job's log, and in the pipeline's where there is one.
report() {
  local line
  line="$(date '+%F %T') ${STAGE_LINE[0]%.sh} (job ${SLURM_JOB_ID:-}): $*"
  echo "$line" >&2
  if [[ -n "${PIPELINE_LOG:-}" ]]; then echo "$line" >>"$PIPELINE_LOG"; fi
}
