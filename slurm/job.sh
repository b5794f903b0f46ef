# shellcheck shell=bash
# Shared by sbatch.sh and pipeline.sh: the job step, its checks, how it ends. Sourcing this file
# only defines functions; source conf/arguments.sh first, and set SCRIPT_DIR to the repository's
# folder. Variables are explained in slurm/README.md.

# shellcheck source=slurm/container.sh
source "$SCRIPT_DIR/slurm/container.sh"

# Exit code of a training stage that saved before its end, after SIGUSR1 or SIGTERM.
REQUEUE_CODE=75
# Exit code of srun if SIGTERM came before the stage had its handler.
ENDED_EARLY=143
# Exit code of the remaining ranks after one was lost.
LOST_RANK_CODE=69
# Starts in a row that may end with nothing saved: a job whose time limit is shorter than its
# start-up would otherwise be requeued forever.
IDLE_STARTS=3
# Stages that resume from what they saved.
RESUMABLE=(eagle3.sh finetune.sh distill.sh)
# Stages that split their work over replicas of the model.
REPLICATED=(quantize.sh mmlu.sh evaluate.sh eagle3.sh finetune.sh distill.sh extract_features.sh
  offline_feature_extract.sh generate.sh validate.sh)

# in_batch_script: whether this shell is a job's batch script (an salloc's shell is not).
in_batch_script() {
  [[ -n "${SLURM_JOB_ID:-}" && -z "${SLURM_STEP_ID:-}" && "${SLURM_TASK_PID:-}" == "$$" ]]
}

# take_words WORDS...: set OPTIONS to what precedes the first <stage>.sh, and STAGE_LINE to the
# rest. A single word with spaces is the whole line, as in Megatron-LM's sbatch.sh.
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
  local names
  mapfile -t names < <(stage_names)
  has_word "${STAGE_LINE[0]}" "${names[@]}" || fail "stage ${STAGE_LINE[0]}" \
    "there is no such stage" "one of: ${names[*]}"
}

# stage_names: print the launchers that start processes of a stage.
stage_names() {
  find "$SCRIPT_DIR" -maxdepth 1 -name '*.sh' ! -name quickstart.sh ! -name report.sh \
    -printf '%f\n' | sort
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

# submit_job WORDS...: check what can be checked here, then submit the job.
submit_job() {
  take_words "$@"
  local gpus processes work
  NNODES=$(requested '--nodes|-N')
  [[ "$NNODES" =~ ^[1-9][0-9]*$ ]] || fail "--nodes=$NNODES" "a fixed number of nodes is needed" \
    "--nodes=2"
  gpus=$(requested '--gpus-per-node|--gres')
  export NNODES GPUS_PER_NODE=${gpus:-0}
  choose_replicas
  processes=$(MLM_LAUNCH=count bash "$SCRIPT_DIR/${STAGE_LINE[0]}" "${STAGE_LINE[@]:1}")
  if ((GPUS_PER_NODE * NNODES > processes)); then
    echo "note: ${STAGE_LINE[0]%.sh} uses $processes of $((GPUS_PER_NODE * NNODES)) GPUs" >&2
  fi
  choose_launch_style
  local line=(sbatch "${OPTIONS[@]}" "$SCRIPT_DIR/slurm/sbatch.sh" "${STAGE_LINE[@]}")
  local words=("${STAGE_LINE[@]}")
  to_array words MLM_EXTRA_ARGS
  if has_word --dry-run "${words[@]}"; then
    work=$(read_set_up && work_folder)
    MLM_WORK_DIR=$work bash "$SCRIPT_DIR/${STAGE_LINE[0]}" "${STAGE_LINE[@]:1}"
    (
      read_set_up
      choose_python
      local python=$PYTHON # make_step sets PYTHON to the container's
      make_step "$processes"
      show "$python" "job step" "${STEP[@]}"
      show "$python" "submission" "${line[@]}"
    )
    return
  fi
  check_here
  unset NNODES GPUS_PER_NODE # the job asks SLURM
  [[ "${DP:-}" != all ]] || unset DP
  export POST_TRAINING_ROOT=$SCRIPT_DIR
  exec "${line[@]}"
}

# show PYTHON NAME WORDS...: a row of --dry-run's table: a command line without --dry-run and
# without secrets.
show() {
  local python=$1 name=$2 word words=()
  shift 2
  for word in "$@"; do
    [[ "$word" == --dry-run ]] || words+=("$word")
  done
  printf '%-13s %s\n' "$name" \
    "$(cd "$SCRIPT_DIR" && "$python" -m post_training.manifest quote "${words[@]}")"
}

# check_here: run the stage's own checks if this machine has what they need. A login node whose jobs
# run in a container often does not.
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

# work_folder: the default is a folder that all nodes share, so not the machine's temporary folder.
work_folder() {
  echo "${MLM_WORK_DIR:-${USER_FSW:-${SLURM_SUBMIT_DIR:-$PWD}}/megatron_workspace}"
}

# make_step PROCESSES: set STEP to the srun line that runs the stage.
make_step() {
  local processes=$1 tasks=$NNODES
  local together=(--kill-on-bad-exit=1)
  # Ranks that have saved exit one by one, and none may be killed while it does.
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

# run_job WORDS...: the batch script: check the layout, run the step, report how it ended.
run_job() {
  local processes code=0
  take_words "$@"
  SAVE_ASKED='' STEP_PID=''
  trap near_the_limit USR1
  # SLURM sends SIGKILL after KillWait, which is long enough to see how the step ended.
  trap 'report "ended by SIGTERM: cancelled, preempted or out of time"' TERM
  report "started on $SLURM_JOB_NODELIST"
  read_set_up
  unset SANDBOX_ENV_SETUP MLM_ENV_SETUP # their variables are exported now
  # SLURM then also requeues the job after a node failure.
  if requeues; then scontrol update "JobId=$SLURM_JOB_ID" Requeue=1; fi
  choose_launch_style
  export NNODES=$SLURM_JOB_NUM_NODES GPUS_PER_NODE=${SLURM_GPUS_ON_NODE:-0}
  choose_replicas
  MLM_WORK_DIR=$(work_folder)
  MASTER_ADDR=${MASTER_ADDR:-$(first_address)}
  export MLM_WORK_DIR MASTER_ADDR
  prepare_state
  processes=$(MLM_LAUNCH=count bash "$SCRIPT_DIR/${STAGE_LINE[0]}" "${STAGE_LINE[@]:1}") ||
    finish $?
  make_step "$processes"
  [[ -z "$SAVE_ASKED" ]] || finish "$REQUEUE_CODE"
  "${STEP[@]}" &
  STEP_PID=$!
  # A trapped signal interrupts wait: repeat it until the step itself has ended.
  while :; do
    code=0
    wait "$STEP_PID" || code=$?
    kill -0 "$STEP_PID" 2>/dev/null || break
  done
  finish "$code"
}

# first_address: the name of the job's first node if it resolves, else the address SLURM has for it.
# The batch script asks: a container has no scontrol.
first_address() {
  local name
  type -P scontrol >/dev/null || fail "scontrol (not found)" \
    "the batch script asks it for the name of the first of $SLURM_JOB_NODELIST" \
    "put SLURM's programs on the PATH, or set MASTER_ADDR to that node's name or address"
  name=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  if getent hosts "$name" >/dev/null; then
    echo "$name"
  else
    scontrol --oneliner show node "$name" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p'
  fi
}

# requeues: whether the job is requeued when its stage saved before its end.
requeues() {
  [[ -n "${MLM_REQUEUE:-}" ]] && resumable
}

# choose_launch_style: torchrun gives its processes 30 s to save and drops their exit code. A job to
# be requeued runs as one task per GPU: srun forwards signals and returns the exit code.
choose_launch_style() {
  if requeues; then export LAUNCH_SCRIPT=${LAUNCH_SCRIPT:-python}; fi
}

# choose_replicas: the job has its nodes to itself, so stages that can use all GPUs do.
choose_replicas() {
  if [[ " ${REPLICATED[*]} " == *" ${STAGE_LINE[0]} "* ]]; then export DP=${DP:-all}; fi
}

resumable() {
  [[ " ${RESUMABLE[*]} " == *" ${STAGE_LINE[0]} "* ]]
}

# near_the_limit: SLURM signals that the time limit is near (--signal=B:USR1@seconds).
near_the_limit() {
  if resumable; then
    SAVE_ASKED=1
    report "the time limit is near: the stage is asked to save"
    if [[ -n "$STEP_PID" ]]; then keep_asking & fi
  else
    report "the time limit is near; ${STAGE_LINE[0]} cannot resume and starts over next time" \
      "(quantize's --auto-quantize-checkpoint and prune's --prune-intermediate-ckpt keep scores)"
  fi
}

# keep_asking: srun forwards the signal to every task. A task that has just started ignores it, so
# it is sent until the step has ended.
keep_asking() {
  while kill -USR1 "$STEP_PID" 2>/dev/null; do sleep 5; done
}

# finish CODE: report how the step ended, requeue a job that can resume, and exit.
finish() {
  local code=$1 why
  if ((code == 0)); then
    report "finished after $SECONDS s"
    rm -f "$MLM_STATE_FILE"
    exit 0
  fi
  case "$code" in
    "$REQUEUE_CODE" | "$ENDED_EARLY" | "$LOST_RANK_CODE") if requeues; then queue_again "$code"; fi ;;
  esac
  if ((code == REQUEUE_CODE)) || { [[ -n "$SAVE_ASKED" ]] && (($(idle_starts) == 0)); }; then
    why="It was asked to end: the same command resumes from what was saved."
  else
    why=$(reason)
  fi
  report "FAILED with exit code $code after $SECONDS s on $SLURM_JOB_NODELIST; jobs that wait for" \
    "it are cancelled. $why"
  rm -f "$MLM_STATE_FILE"
  exit "$code"
}

# queue_again CODE: requeue the job and exit; returns if it must not be requeued.
queue_again() {
  local idle what=saved
  # A cancelled job saves too, but must not come back.
  [[ "$(squeue --noheader --format=%T "--jobs=$SLURM_JOB_ID")" == RUNNING ]] || return 0
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

# prepare_state: export MLM_STATE_FILE, where the stage records in which start of the job it last
# saved (post_training/distributed/placement.py). USER_FSW has the same path in a container as
# outside.
prepare_state() {
  export MLM_STATE_FILE=${CONTAINER_IMAGE:+$USER_FSW/megatron_workspace}
  MLM_STATE_FILE=${MLM_STATE_FILE:-$MLM_WORK_DIR}/jobs/$SLURM_JOB_ID.state
  mkdir -p "${MLM_STATE_FILE%/*}"
  # A job number may come again after SLURM was reinstalled.
  [[ -n "${SLURM_RESTART_COUNT:-}" ]] || rm -f "$MLM_STATE_FILE"
}

# idle_starts: how many starts of the job in a row, this one included, saved nothing.
idle_starts() {
  local saved=-1
  [[ ! -f "$MLM_STATE_FILE" ]] || saved=$(sed -n 's/^restart=//p' "$MLM_STATE_FILE")
  echo $((${SLURM_RESTART_COUNT:-0} - saved))
}

# reason: the first error in the job's log, else its last lines, for a person to read.
reason() {
  local log
  log=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *StdOut=//p')
  [[ -r "$log" ]] || return 0
  echo "From $log:"
  # A stage's own message, else the last line of a traceback.
  if ! grep --max-count=1 --after-context=2 '^error: ' "$log" &&
    ! grep --max-count=1 -E '^(\[rank[0-9]+\]: )?[A-Za-z_.]+(Error|Exception)\b' "$log"; then
    tail -n 5 "$log"
  fi | sed 's/^/    /'
}

# report WORDS...: write a line to the job's log, and to the pipeline's if there is one.
report() {
  local line
  line="$(date '+%F %T') ${STAGE_LINE[0]%.sh} (job ${SLURM_JOB_ID:-}): $*"
  echo "$line" >&2
  if [[ -n "${PIPELINE_LOG:-}" ]]; then echo "$line" >>"$PIPELINE_LOG"; fi
}
