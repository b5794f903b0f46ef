# shellcheck shell=bash
# What every launcher (convert.sh, quantize.sh, ...) shares: defaults, checks and the one launch.
# Sourcing this file defines functions and does nothing else. A launcher sets SCRIPT_DIR, then:
#
#     start convert "$@"                      # reads the conf and the variables below
#     launch convert --save "$MLM_MODEL_SAVE" # checks, then replaces this process by the stage
#
# Variables, all optional; what you set wins over what a conf sets:
#
#     HF_MODEL_CKPT      Hugging Face folder or hub name      (the conf's name)
#     TOKENIZER_MODEL    tokenizer folder or hub name         (HF_MODEL_CKPT)
#     MLM_MODEL_CKPT     Megatron checkpoint to load; wins over HF_MODEL_CKPT
#     MLM_MODEL_SAVE     where to save                        ($MLM_WORK_DIR/<conf>_mlm, _quant, ...)
#     EXPORT_DIR         where export.sh writes               ($MLM_WORK_DIR/<conf>_export)
#     MLM_WORK_DIR       work folder                          (megatron_workspace in $TMPDIR or /tmp)
#     MLM_EXTRA_ARGS     further flags, split at white space
#     MLM_PROMPTS, MLM_REF_LABEL   prompts and expected texts of the smoke generation, split by |
#     TP PP CP           tensor, pipeline and context parallel size          (1)
#     EP ETP             expert and expert-tensor parallel size              (1, TP)
#     DP                 copies of the model                                 (1)
#     LAUNCH_SCRIPT      replaces the launcher, e.g. "python" under SLURM    (torchrun, if needed)
#     SANDBOX_ENV_SETUP  shell file with any of these, sourced first
#     MLM_ENV_SETUP      shell file for the site, sourced next
#     SANDBOX_ROOT       folder whose conf/model/<conf>.sh (or conf/<conf>.sh) is used instead
#     PYTHON             interpreter  (the active environment's, else .venv's, else python3)
#
# A conf sets MODEL_ARGS, the model's flags: an array here; a string, as in Megatron-LM, works too.

# The shared flags of the stage, filled by start; the words after the conf's name; all sizes.
FLAGS=()
REST=()
WORLD=1

# fail WHAT CAUSE REMEDY: one message in the form that the Python side uses, exit code 2.
fail() {
  printf 'error: %s\n  cause: %s\n  remedy: %s\n' "$1" "$2" "$3" >&2
  exit 2
}

# require VARIABLE MEANING: fail unless the variable has a value.
require() {
  [[ -n "${!1:-}" ]] || fail "$1 (not set)" "$2 is needed" "$1=... bash $(basename "$0") <conf>"
}

# start STAGE CONF [WORDS...]: read the set-up files, the conf and the defaults; fill FLAGS, REST.
start() {
  local stage=$1
  shift
  local variable
  for variable in SANDBOX_ENV_SETUP MLM_ENV_SETUP; do
    [[ -z "${!variable:-}" ]] && continue
    [[ -f "${!variable}" ]] || fail "$variable=${!variable}" "there is no such file" "correct it"
    read_loosely "${!variable}"
  done
  choose_python
  case "${1:-}" in
    -h | --help | --help-all) exec "$PYTHON" "$SCRIPT_DIR/$stage.py" "$@" ;;
    "" | -*) fail "bash $stage.sh ${1:-}" "the first word names the model" \
      "bash $stage.sh <conf>, one of: $(conf_names | paste -sd ' ')" ;;
  esac
  MLM_MODEL_CFG=${1%.sh}
  shift
  REST=("$@")
  MLM_WORK_DIR=${MLM_WORK_DIR:-${TMPDIR:-/tmp}/megatron_workspace}
  read_conf
  HF_MODEL_CKPT=${HF_MODEL_CKPT:-$MLM_MODEL_CFG}
  TOKENIZER_MODEL=${TOKENIZER_MODEL:-$HF_MODEL_CKPT}
  to_array FLAGS MODEL_ARGS
  FLAGS+=(--tokenizer-model "$TOKENIZER_MODEL")
}

# read_loosely FILE: source a file that was not written for strict mode.
read_loosely() {
  set +eu
  # shellcheck source=/dev/null
  source "$1"
  set -eu
}

# choose_python: the interpreter that runs the stages.
choose_python() {
  [[ -n "${PYTHON:-}" ]] && return
  local candidate
  for candidate in "${VIRTUAL_ENV:-}" "${CONDA_PREFIX:-}" "${MLM_VENV:-$SCRIPT_DIR/.venv}"; do
    [[ -n "$candidate" && -x "$candidate/bin/python" ]] || continue
    PYTHON=$candidate/bin/python
    return
  done
  PYTHON=$(type -P python3) || fail "python3" "it is not on the PATH" "bash quickstart.sh"
}

# conf_folder: where the confs are.
conf_folder() {
  local root=${SANDBOX_ROOT:-$SCRIPT_DIR}
  if [[ -d "$root/conf/model" ]]; then echo "$root/conf/model"; else echo "$root/conf"; fi
}

# conf_names: the name of every conf, one a line.
conf_names() {
  local folder
  folder=$(conf_folder)
  find "$folder" -mindepth 2 -name '*.sh' -printf '%P\n' | sed 's/\.sh$//' | sort
}

# read_conf: source the conf that MLM_MODEL_CFG names, and put back what the user had set.
read_conf() {
  local file names variable
  file=$(conf_folder)/$MLM_MODEL_CFG.sh
  if [[ ! -f "$file" ]]; then
    mapfile -t names < <(conf_names)
    fail "conf $MLM_MODEL_CFG" "there is no $file" "$(nearest "$MLM_MODEL_CFG" "${names[@]}")"
  fi
  local -A given=()
  for variable in HF_MODEL_CKPT TOKENIZER_MODEL TP PP CP EP ETP DP; do
    [[ -n "${!variable:-}" ]] && given[$variable]=${!variable}
  done
  unset MODEL_ARGS
  read_loosely "$file"
  for variable in "${!given[@]}"; do
    printf -v "$variable" '%s' "${given[$variable]}"
  done
  [[ -n "${MODEL_ARGS[*]:-}" ]] || fail "conf $file" "it does not set MODEL_ARGS" \
    "MODEL_ARGS=(--num-layers 28 ...)"
}

# nearest NAME KNOWN...: a sentence with the names most like NAME, else with all of them.
nearest() {
  local program='import sys; from post_training.errors import suggest
print(suggest(sys.argv[1], sys.argv[2:]) or "choose one of: " + " ".join(sys.argv[2:]))'
  (cd "$SCRIPT_DIR" && "$PYTHON" -c "$program" "$@")
}

# to_array TARGET VARIABLE: append a variable's words to the array TARGET. An array is taken as it
# is; a string is split at white space and nothing in it is expanded: [0]*3 stays [0]*3.
to_array() {
  local -n target=$1 source=$2
  local words=()
  if [[ "$(declare -p "$2" 2>/dev/null)" == "declare -a"* ]]; then
    words=("${source[@]}")
  else
    read -r -d '' -a words <<<"${source:-}" || true
  fi
  target+=("${words[@]}")
}

# count_processes: WORLD from the parallel sizes, and their flags.
#
# A pipeline stage takes the larger of TP x CP (the dense part) and EP x ETP (the experts)
# processes; the smaller must divide it, since both parts live on the same processes.
count_processes() {
  local name
  for name in TP PP CP EP DP; do
    printf -v "$name" '%s' "${!name:-1}"
  done
  ETP=${ETP:-$TP}
  for name in TP PP CP EP ETP DP; do
    [[ "${!name}" =~ ^[1-9][0-9]*$ ]] || fail "$name=${!name}" \
      "a parallel size is a whole number from 1" "$name=1"
  done
  local dense=$((TP * CP)) experts=$((EP * ETP)) larger
  larger=$((dense > experts ? dense : experts))
  if ((larger * DP % dense || larger * DP % experts)); then
    fail "TP=$TP CP=$CP EP=$EP ETP=$ETP DP=$DP" \
      "TP x CP = $dense and EP x ETP = $experts share processes, and neither divides the other" \
      "choose EP x ETP as a divisor or a multiple of TP x CP; ETP=1 is often right"
  fi
  WORLD=$((larger * DP * PP))
  FLAGS+=(
    --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP"
    --context-parallel-size "$CP" --expert-model-parallel-size "$EP"
    --expert-tensor-parallel-size "$ETP"
  )
}

# launch STAGE [FLAGS...]: check without starting anything, then become the stage's processes.
launch() {
  local stage=$1 launcher=()
  shift
  count_processes
  local arguments=("${FLAGS[@]}" "$@")
  to_array arguments MLM_EXTRA_ARGS
  arguments+=("${REST[@]}")
  # A mistake shows here within a second, once, and not from every process of a job.
  "$PYTHON" "$SCRIPT_DIR/$stage.py" "${arguments[@]}" --check
  export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
  # Megatron's overlap of communication relies on the order of launches on one connection.
  export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
  if [[ -n "${LAUNCH_SCRIPT:-}" ]]; then
    to_array launcher LAUNCH_SCRIPT
  elif ((WORLD == 1)); then
    launcher=("$PYTHON")
  else
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    launcher=("$PYTHON" -m torch.distributed.run "--nproc_per_node=$WORLD")
    # A port of its own, so that two jobs on a machine do not meet.
    [[ -n "${PET_RDZV_ENDPOINT:-}${PET_MASTER_ADDR:-}" ]] || launcher+=(--standalone)
  fi
  exec "${launcher[@]}" "$SCRIPT_DIR/$stage.py" "${arguments[@]}"
}
