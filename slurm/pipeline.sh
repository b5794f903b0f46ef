#!/usr/bin/env bash
# Run a chain of stages as SLURM jobs that depend on each other; a failure cancels the rest.
#
#   bash slurm/pipeline.sh [sbatch options] <chain> <conf> [format]
#   TP=8 bash slurm/pipeline.sh --nodes=1 quantize Qwen/Qwen3-8B NVFP4_DEFAULT_CFG
#
#   quantize         convert -> quantize -> mmlu -> export       (format: FP8_DEFAULT_CFG)
#   quantize-export  quantize that exports in the same job: no checkpoint, no score
#   prune            convert -> prune -> distill -> mmlu -> export
#   eagle3           convert -> eagle3 -> validate -> export
#
# Settings of one stage are prefixed with its name in capitals, e.g. for quantize:
#   QUANTIZE_ARGS    further flags, split like MLM_EXTRA_ARGS
#   QUANTIZE_SBATCH  further sbatch options, e.g. --nodes=2
#   QUANTIZE_TP ...  its TP, PP, CP, EP, ETP or DP
# Outputs are in MLM_WORK_DIR, by default megatron_workspace in USER_FSW or the current folder. A
# stage whose output is complete, by the same command from the same input, is skipped; interrupted
# training resumes. With --dry-run among the options every stage's plan is shown and nothing
# submitted. See slurm/README.md.
set -euo pipefail
SCRIPT_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=conf/arguments.sh
source "$SCRIPT_DIR/conf/arguments.sh"
# shellcheck source=slurm/job.sh
source "$SCRIPT_DIR/slurm/job.sh"

usage() {
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" >&2
  exit "$1"
}

# choose_chain CHAIN: set STAGES, in order.
choose_chain() {
  case "$1" in
    quantize) STAGES=(convert quantize mmlu export) ;;
    quantize-export) STAGES=(quantize) ;;
    prune) STAGES=(convert prune distill mmlu export) ;;
    eagle3) STAGES=(convert eagle3 validate export) ;;
    *) fail "chain $1" "unknown" "quantize, quantize-export, prune or eagle3" ;;
  esac
}

# stage_of NAME: set what that stage reads and writes: INPUT, OUTPUT, STAGE_WORDS, and STAGE_ENV,
# the variables for its launcher. MODEL is what the stages before it made.
stage_of() {
  local base=$MLM_WORK_DIR/$MLM_MODEL_CFG name
  INPUT=$MODEL STAGE_WORDS=()
  case "$1" in
    convert) OUTPUT=${base}_mlm ;;
    quantize) OUTPUT=${base}_quant STAGE_WORDS=("${FORMAT[@]}") ;;
    prune) OUTPUT=${base}_pruned ;;
    distill) OUTPUT=${base}_distilled ;;
    eagle3) OUTPUT=$base-Eagle3 ;;
    mmlu) OUTPUT=$MODEL.mmlu.json STAGE_WORDS=(--mmlu-output "$OUTPUT") ;;
    validate) OUTPUT=$MODEL.validate.json STAGE_WORDS=(--validate-output "$OUTPUT") ;;
    export)
      OUTPUT=${base}_export
      if [[ "$CHAIN" == eagle3 ]]; then
        # The draft is exported; its target exists already.
        OUTPUT=${base}_draft STAGE_WORDS=(--export-extra-modules)
      fi
      OUTPUT=${EXPORT_DIR:-$OUTPUT}
      ;;
  esac
  STAGE_ENV=("MLM_MODEL_SAVE=$OUTPUT" "EXPORT_DIR=")
  if [[ "$1" == export ]]; then
    STAGE_ENV=("EXPORT_DIR=$OUTPUT")
  elif [[ "$CHAIN" == quantize-export ]]; then
    OUTPUT=${EXPORT_DIR:-${base}_export}
    STAGE_ENV=(MLM_MODEL_SAVE= "EXPORT_DIR=$OUTPUT")
  fi
  [[ "$1" != distill ]] || STAGE_ENV+=("TEACHER_CKPT=${TEACHER_CKPT:-${base}_mlm}")
  [[ "$MODEL" == "$HF_MODEL_CKPT" ]] || STAGE_ENV+=("MLM_MODEL_CKPT=$MODEL")
  local own=${1^^}_ARGS
  to_array STAGE_WORDS "$own"
  # A rerun replaces an output that is no longer valid; training resumes instead.
  case "$1" in convert | quantize | prune | export) STAGE_WORDS+=(--overwrite) ;; esac
  for name in TP PP CP EP ETP DP; do
    own=${1^^}_$name
    [[ -z "${!own:-}" ]] || STAGE_ENV+=("$name=${!own}")
  done
}

# is_valid STAGE: whether its output can be kept.
is_valid() {
  local words=()
  mapfile -d '' -t words < <(
    env "${STAGE_ENV[@]}" MLM_LAUNCH=words bash "$SCRIPT_DIR/$1.sh" "$CONF" "${STAGE_WORDS[@]}"
  )
  "$PYTHON" -m post_training.manifest valid "$OUTPUT" "$INPUT" "${words[@]}"
}

# require_same_start STAGE: fail if an earlier stage will remake the model that the training run in
# OUTPUT started from. Training is too expensive to drop silently, or to resume from another model.
require_same_start() {
  case "$1" in distill | eagle3) ;; *) return 0 ;; esac
  ! has_word --overwrite "${STAGE_WORDS[@]}" || return 0
  grep -qs '^[0-9]' "$OUTPUT/latest_checkpointed_iteration.txt" || return 0
  fail "$1: output $OUTPUT" \
    "it holds a training run, and $INPUT, which that run started from, will be made again" \
    "train again with ${1^^}_ARGS=--overwrite (added to its flags), or set another MLM_WORK_DIR"
}

# submit STAGE: submit it to run after the previous job; sets JOB.
submit() {
  local line=(sbatch --parsable "${OPTIONS[@]}" "--job-name=$1" "--output=$FOLDER/$1-%j.log")
  [[ -z "$JOB" ]] || line+=("--dependency=afterok:$JOB" --kill-on-invalid-dep=yes)
  to_array line "${1^^}_SBATCH"
  line+=("$SCRIPT_DIR/slurm/sbatch.sh" "$1.sh" "$CONF" "${STAGE_WORDS[@]}")
  JOB=$(env "${STAGE_ENV[@]}" "PIPELINE_LOG=$FOLDER/pipeline.log" \
    "POST_TRAINING_ROOT=$SCRIPT_DIR" "${line[@]}")
  JOB=${JOB%%;*}
  JOBS+=("$JOB")
}

main() {
  local dry_run='' stage
  OPTIONS=() JOBS=() JOB=
  while [[ "${1:-}" == -* ]]; do
    case "$1" in
      -h | --help) usage 0 ;;
      --dry-run) dry_run=1 ;;
      *=* | -[A-Za-z]?*) OPTIONS+=("$1") ;;
      *) fail "sbatch option $1" "its value cannot be told from the chain" "write $1=VALUE" ;;
    esac
    shift
  done
  (($# >= 2)) || usage 2
  CHAIN=$1
  choose_chain "$CHAIN"
  CONF=${2%.sh}
  FORMAT=("${@:3}")
  read_set_up
  unset SANDBOX_ENV_SETUP # its variables are exported now; each job gets its own MLM_MODEL_CKPT
  choose_python
  export MLM_WORK_DIR=${MLM_WORK_DIR:-${USER_FSW:-$PWD}/megatron_workspace} PYTHON
  MLM_MODEL_CFG=$CONF
  if [[ "$CONF" == auto ]]; then name_model; else HF_MODEL_CKPT=${HF_MODEL_CKPT:-$CONF}; fi
  export HF_MODEL_CKPT
  keep_paths
  cd "$SCRIPT_DIR"

  # Find every mistake before the first job is submitted.
  MODEL=${MLM_MODEL_CKPT:-$HF_MODEL_CKPT}
  unset MLM_MODEL_CKPT MLM_MODEL_SAVE
  local first=$MODEL plan
  for stage in "${STAGES[@]}"; do
    stage_of "$stage"
    local own=() after=${stage^^}_SBATCH
    to_array own "$after"
    plan=$(env "${STAGE_ENV[@]}" bash slurm/sbatch.sh "${OPTIONS[@]}" "${own[@]}" "$stage.sh" \
      "$CONF" "${STAGE_WORDS[@]}" --dry-run) || exit $?
    [[ -z "$dry_run" ]] || printf '== %s\n%s\n\n' "$stage" "$plan"
    next_model "$stage"
  done
  [[ -z "$dry_run" ]] || exit 0
  local -A runs=()
  MODEL=$first
  for stage in "${STAGES[@]}"; do
    stage_of "$stage"
    # After a stage that runs, all later stages have a new input.
    if ((${#runs[@]} > 0)); then
      require_same_start "$stage"
      runs[$stage]=1
    elif ! is_valid "$stage"; then
      # Its input exists: all of its checks can run.
      STAGE_LINE=("$stage.sh" "$CONF" "${STAGE_WORDS[@]}")
      (export "${STAGE_ENV[@]}" && check_here)
      runs[$stage]=1
    fi
    next_model "$stage"
  done

  FOLDER=$MLM_WORK_DIR/pipeline/$MLM_MODEL_CFG-$(date +%Y%m%d-%H%M%S)
  mkdir -p "$FOLDER"
  MODEL=$first
  for stage in "${STAGES[@]}"; do
    stage_of "$stage"
    if [[ -z "${runs[$stage]:-}" ]]; then
      echo "$stage: $OUTPUT is still valid and is kept" | tee -a "$FOLDER/pipeline.log"
    else
      submit "$stage"
      echo "$stage: job $JOB${JOBS[1]:+ after ${JOBS[-2]:-}}, makes $OUTPUT" |
        tee -a "$FOLDER/pipeline.log"
    fi
    next_model "$stage"
  done
  if ((${#JOBS[@]} == 0)); then
    echo "nothing to do: every stage's output is valid"
  else
    echo "watch them, and see why one failed: tail -n +1 -F $FOLDER/pipeline.log"
  fi
}

# keep_paths: make the variables' relative paths absolute: the jobs run in the repository's folder.
keep_paths() {
  local variable
  for variable in MLM_WORK_DIR EXPORT_DIR; do
    [[ -z "${!variable:-}" || "${!variable}" == /* ]] || export "$variable=$PWD/${!variable}"
  done
  for variable in HF_MODEL_CKPT MLM_MODEL_CKPT TEACHER_CKPT TOKENIZER_MODEL SANDBOX_ROOT DATASET \
    PROMPTS_PATH; do
    [[ "${!variable:-/}" == /* || ! -e "${!variable}" ]] || export "$variable=$PWD/${!variable}"
  done
}

# next_model STAGE: set MODEL. Scores are about a model; other outputs are the next stage's input.
next_model() {
  case "$1" in mmlu | validate) ;; *) MODEL=$OUTPUT ;; esac
}

main "$@"
