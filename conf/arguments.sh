# shellcheck shell=bash
# Shared by all launchers (convert.sh, quantize.sh, ...): defaults, checks and the one launch.
# Sourcing this file only defines functions. A launcher sets SCRIPT_DIR, then:
#
#     start convert "$@"                      # reads the conf and the variables below
#     launch convert --save "$MLM_MODEL_SAVE" # checks, then replaces this process by the stage
#
# Variables, all optional; what you set wins over what a conf sets:
#
#     HF_MODEL_CKPT      Hugging Face folder or hub name      (the conf's name)
#     TOKENIZER_MODEL    tokenizer folder or hub name         (HF_MODEL_CKPT)
#     MLM_MODEL_CKPT     Megatron checkpoint to load; wins over HF_MODEL_CKPT
#     SERVER             address of an OpenAI-compatible server that has the model; none is loaded
#     SERVER_MODEL       the model's name there             (its only one)
#     MLM_MODEL_SAVE     where to save                        ($MLM_WORK_DIR/<conf>_mlm, _quant, ...)
#     EXPORT_DIR         where export.sh writes               ($MLM_WORK_DIR/<conf>_export);
#                        quantize.sh exports too if it is set, and saves only to MLM_MODEL_SAVE
#     MLM_WORK_DIR       work folder                          (megatron_workspace in $TMPDIR or /tmp)
#     MLM_EXTRA_ARGS     further flags, split at white space (see to_array about spaces in a value)
#     MLM_PROMPTS, MLM_REF_LABEL   prompts and expected texts of the smoke generation, split by |
#     TP PP CP           tensor, pipeline and context parallel size          (1)
#     EP ETP             expert and expert-tensor parallel size              (1, TP)
#     DP                 replicas of the model; "all": as many as the GPUs of all nodes hold  (1)
#     LAUNCH_SCRIPT      replaces the launcher: "python" if every process is started from
#                        outside, each as a SLURM task                      (torchrun, if needed)
#     NNODES NODE_RANK MASTER_ADDR MASTER_PORT   several nodes, with this launcher run once on each
#                        (the SLURM step's, else one node)
#     GPUS_PER_NODE      refuse more processes than this on a node           (not checked);
#                        also what DP=all fills                              (the visible GPUs)
#     SANDBOX_ENV_SETUP  shell file that sets any of these, sourced first and exported
#     MLM_ENV_SETUP      shell file for the site, sourced next
#     SANDBOX_ROOT       folder whose conf/model/<conf>.sh (or conf/<conf>.sh) is used instead
#     PYTHON             interpreter  (the active environment's, else .venv's, else python3)
#     MLM_LAUNCH         what to do instead of launching: "count" prints the number of processes
#                        if they fit the nodes, "words" the stage's words, NUL-terminated,
#                        "check" runs the checks of --check
#
# A conf sets MODEL_ARGS, the model's flags: an array here; a string, as in Megatron-LM, works too.
# Instead of a conf's name, "auto" takes the architecture from config.json or the checkpoint.

# Set by start: the stage's shared flags, and the words after the conf's name. By count_processes:
# the number of processes.
FLAGS=()
REST=()
WORLD=1

# fail WHAT CAUSE REMEDY: print an error as the Python side does, and exit with code 2.
fail() {
  # All SLURM tasks of a node see the same mistake; only the first reports it.
  if [[ "${SLURM_LOCALID:-0}" == 0 ]]; then
    printf 'error: %s\n  cause: %s\n  remedy: %s\n' "$1" "$2" "$3" >&2
  fi
  exit 2
}

# counted NUMBER ONE MANY: "1 process", "2 processes".
counted() {
  if (($1 == 1)); then echo "1 $2"; else echo "$1 $3"; fi
}

# has_word WORD WORDS...: whether it is one of them, and not only a part of one.
has_word() {
  local word
  for word in "${@:2}"; do [[ "$word" != "$1" ]] || return 0; done
  return 1
}

# require VARIABLE MEANING: fail unless the variable has a value.
require() {
  [[ -n "${!1:-}" ]] || fail "$1 (not set)" "$2 is needed" "$1=... bash $(basename "$0") <conf>"
}

# has_draft CHECKPOINT WORDS...: whether its run.json says so, or a word that only a draft has a use
# for, where an earlier job may be going to make the checkpoint.
has_draft() {
  local features="[[:space:]]--(offline-distillation-data|export-offline-model)[[:space:]=]"
  [[ ! " ${*:2} ${MLM_EXTRA_ARGS:-} " =~ $features ]] || return 0
  [[ -f "$1/run.json" ]] || return 1
  "$PYTHON" -P -c 'import json, sys; sys.exit(not json.load(open(sys.argv[1])).get("draft"))' \
    "$1/run.json" 2>/dev/null
}

# asks_server: whether a server has the model: SERVER names one, or a word after the conf's name.
asks_server() {
  [[ -n "${SERVER:-}" || " ${REST[*]} ${MLM_EXTRA_ARGS:-} " =~ [[:space:]]--server[[:space:]=] ]]
}

# model_flags ARRAY [CHECKPOINT]: append the flags that name the model, by default a Megatron
# checkpoint where one is named here, or the server that has it.
model_flags() {
  local -n named=$1
  local checkpoint=${MLM_MODEL_CKPT:-}
  if asks_server; then
    [[ -z "${SERVER:-}" ]] || named+=(--server "$SERVER")
    [[ -z "${SERVER_MODEL:-}" ]] || named+=(--server-model "$SERVER_MODEL")
  else
    checkpoint=${checkpoint:-${2:-}}
    named+=(--pretrained-model-path "$HF_MODEL_CKPT")
  fi
  [[ -z "$checkpoint" ]] || named+=(--load "$checkpoint")
}

# start STAGE CONF [WORDS...]: read the set-up files, the conf and the defaults; fill FLAGS, REST.
start() {
  local stage=$1
  shift
  read_set_up
  choose_python
  check_python "$@"
  case "${1:-}" in
    -h | --help | --help-all | --list-formats) exec "$PYTHON" "$SCRIPT_DIR/$stage.py" "$@" ;;
    "" | -*) fail "bash $stage.sh ${1:-}" "the first word names the model" \
      "bash $stage.sh <conf>, auto or one of: $(conf_names | paste -sd ' ')" ;;
  esac
  MLM_MODEL_CFG=${1%.sh}
  shift
  REST=("$@")
  MLM_WORK_DIR=${MLM_WORK_DIR:-${TMPDIR:-/tmp}/megatron_workspace}
  if [[ "$MLM_MODEL_CFG" == auto ]]; then
    name_model
  else
    read_conf
    HF_MODEL_CKPT=${HF_MODEL_CKPT:-$MLM_MODEL_CFG}
    to_array FLAGS MODEL_ARGS
  fi
  # A checkpoint alone brings its own tokenizer.
  TOKENIZER_MODEL=${TOKENIZER_MODEL:-$HF_MODEL_CKPT}
  FLAGS+=(--tokenizer-model "$TOKENIZER_MODEL")
}

# name_model: for "auto", set MLM_MODEL_CFG, by which outputs are named, to the model's hub name or
# the name of its folder, without the _mlm of convert.sh.
name_model() {
  local model=${HF_MODEL_CKPT:-${MLM_MODEL_CKPT:-}}
  ! asks_server || model=${model:-${SERVER_MODEL:-server}}
  [[ -n "$model" ]] || fail "conf auto" "neither HF_MODEL_CKPT nor MLM_MODEL_CKPT names a model" \
    "HF_MODEL_CKPT=<folder or hub name> bash $(basename "$0") auto, or name a conf"
  HF_MODEL_CKPT=${HF_MODEL_CKPT:-}
  if [[ -d "$model" ]]; then
    model=$(basename "$(cd "$model" && pwd)")
  elif [[ ! "$model" =~ ^[[:alnum:]_][^/]*/[^/]+$ ]]; then
    model=$(basename "$model")
  fi
  MLM_MODEL_CFG=${model%_mlm}
}

# read_set_up: source the set-up files and export what they set. Megatron-LM's documents call
# MLM_MODEL_CKPT by another name, MLM_MODEL_LOAD.
read_set_up() {
  local variable
  for variable in SANDBOX_ENV_SETUP MLM_ENV_SETUP; do
    [[ -z "${!variable:-}" ]] && continue
    [[ -f "${!variable}" ]] || fail "$variable=${!variable}" "there is no such file" "correct it"
    set -a
    read_loosely "${!variable}"
    set +a
  done
  [[ -z "${MLM_MODEL_LOAD:-}" ]] || export MLM_MODEL_CKPT=${MLM_MODEL_CKPT:-$MLM_MODEL_LOAD}
}

# read_loosely FILE: source a file that was not written for strict mode.
read_loosely() {
  ! grep -q $'\r$' "$1" ||
    fail "$1" "its lines end as in Windows (CR LF)" "sed -i 's/\\r\$//' $1"
  # What the launcher is about to do would be left out, with exit code 0.
  BEING_READ=$1
  trap 'fail "$BEING_READ" "it ends the shell" "take exit, exec and set -e out of it"' EXIT
  set +eu
  # shellcheck source=/dev/null
  source "$1"
  set -eu
  [[ "$(trap -p EXIT)" != *BEING_READ* ]] || trap - EXIT
}

# choose_python: the interpreter that runs the stages. -P keeps it from importing from the current
# folder, which -m and -c do, and so do entries of PYTHONPATH that are empty, as the first one of
# $PYTHONPATH:/x is where it was not set, or relative. A stage is imported from its own folder,
# which PYTHONSAFEPATH would prevent. With PYTHONWARNINGS=error any warning of a package would end
# torchrun, and PYTHONOPTIMIZE leaves out the checks (assert) of megatron-core.
choose_python() {
  unset PYTHONSAFEPATH PYTHONWARNINGS PYTHONOPTIMIZE
  keep_absolute PYTHONPATH
  if [[ -n "${PYTHON:-}" ]]; then
    type -P "$PYTHON" >/dev/null || fail "PYTHON=$PYTHON" "there is no such program" "unset PYTHON"
    return
  fi
  local candidate
  for candidate in "${VIRTUAL_ENV:-}" "${CONDA_PREFIX:-}" "${MLM_VENV:-$SCRIPT_DIR/.venv}"; do
    [[ -n "$candidate" && -x "$candidate/bin/python" ]] || continue
    PYTHON=$candidate/bin/python
    return
  done
  PYTHON=$(type -P python3) || fail "python3" "it is not on the PATH" "bash quickstart.sh"
}

# keep_absolute VARIABLE: drop the entries of a search path that depend on the current folder.
keep_absolute() {
  [[ -n "${!1+set}" ]] || return 0
  local entry entries kept=
  IFS=: read -ra entries <<<"${!1}"
  for entry in "${entries[@]}"; do [[ "$entry" != /* ]] || kept+=:$entry; done
  export "$1=${kept#:}"
}

# check_python [WORDS...]: fail unless the interpreter starts, and has the packages that the stage
# with these words needs.
check_python() {
  local needed="safetensors pydantic xxhash yaml tqdm rich transformers" said code=0
  local program='import os, sys
from importlib.util import find_spec
missing = [each for each in sys.argv[1].split() if find_spec(each) is None]
print(*missing, sep=", ")
if missing: sys.exit(3)
if any(each.startswith("TQDM_") for each in os.environ): import tqdm'
  local words=("$@")
  to_array words MLM_EXTRA_ARGS
  [[ -n "${MLM_LAUNCH:-}" ]] || has_word --dry-run "${words[@]}" ||
    needed+=" torch megatron modelopt"
  said=$("$PYTHON" -P -c "$program" "$needed" 2>&1) || code=$?
  ((code != 3)) || fail "PYTHON=$PYTHON" "it has no $said" \
    "name the interpreter of an environment that has the packages; bash quickstart.sh makes one"
  ((code == 0)) || fail "PYTHON=$PYTHON" "it does not start: $(grep '[Ee]rror:' <<<"$said" | tail -n 1)" \
    "correct or unset the variables PYTHON... and TQDM_..., or name another interpreter"
}

# conf_folder: print the folder of the confs.
conf_folder() {
  local root=${SANDBOX_ROOT:-$SCRIPT_DIR}
  if [[ -d "$root/conf/model" ]]; then echo "$root/conf/model"; else echo "$root/conf"; fi
}

# conf_names: print the name of every conf, one per line.
conf_names() {
  local folder
  folder=$(conf_folder)
  find "$folder" -mindepth 2 -name '*.sh' -printf '%P\n' | sed 's/\.sh$//' | sort
}

# read_conf: source the conf that MLM_MODEL_CFG names, then restore what the user had set.
read_conf() {
  local file names variable
  file=$(conf_folder)/$MLM_MODEL_CFG.sh
  if [[ ! -f "$file" ]]; then
    mapfile -t names < <(conf_names)
    fail "conf $MLM_MODEL_CFG" "there is no $file" "$(nearest "$MLM_MODEL_CFG" "${names[@]}")"
  fi
  local -A mlm_given=([SCRIPT_DIR]=$SCRIPT_DIR)
  for variable in HF_MODEL_CKPT TOKENIZER_MODEL TP PP CP EP ETP DP; do
    [[ -n "${!variable:-}" ]] && mlm_given[$variable]=${!variable}
  done
  unset MODEL_ARGS
  local mlm_folder=$PWD # relative paths of the command line are of this folder
  read_loosely "$file"
  [[ "$PWD" == "$mlm_folder" ]] || cd "$mlm_folder"
  for variable in "${!mlm_given[@]}"; do
    printf -v "$variable" '%s' "${mlm_given[$variable]}"
  done
  [[ -n "${MODEL_ARGS[*]:-}" ]] || fail "conf $file" "it does not set MODEL_ARGS" \
    "MODEL_ARGS=(--num-layers 28 ...)"
}

# nearest NAME KNOWN...: print a sentence with the names closest to NAME, else with all of them.
nearest() {
  local program='import sys; from post_training.common.errors import suggest
print(suggest(sys.argv[1], sys.argv[2:]) or "choose one of: " + " ".join(sys.argv[2:]))'
  (cd "$SCRIPT_DIR" && "$PYTHON" -c "$program" "$@")
}

# to_array TARGET VARIABLE: append a variable's words to the array TARGET. An array is copied, a
# string is split (split_words).
to_array() {
  local -n array=$1 source=$2
  if [[ "$(declare -p "$2" 2>/dev/null)" == "declare -a"* ]]; then
    array+=("${source[@]}")
  else
    split_words "$1" "${source:-}" "$2"
  fi
}

# split_words TARGET TEXT NAME: append the words of TEXT to the array TARGET; NAME is for messages.
# Words end at white space and are not expanded: [0]*3 stays [0]*3, and {"num_layers":24} keeps its
# quotes. A value with spaces must be quoted as a whole, '...' or "...", by itself or after the = of
# --flag='...'; the outer quotes are removed, and what is between them is not interpreted.
split_words() {
  local -n target=$1
  local rest=$2 word quoted="^([^[:space:]'\"=]*=)?('[^']*'|\"[^\"]*\")([[:space:]]|\$)"
  while rest=${rest#"${rest%%[![:space:]]*}"} && [[ -n "$rest" ]]; do
    if [[ "$rest" =~ $quoted ]]; then
      word=${BASH_REMATCH[1]}${BASH_REMATCH[2]}
      target+=("${BASH_REMATCH[1]}${BASH_REMATCH[2]:1:-1}")
    elif [[ "$rest" == [\'\"]* ]]; then
      fail "$3: $rest" "the quote at its start is not closed at the end of a word" \
        "quote the whole value: '...' or \"...\""
    else
      word=${rest%%[[:space:]]*}
      target+=("$word")
    fi
    rest=${rest:${#word}}
  done
}

# count_processes: set WORLD from the parallel sizes, and append their flags.
#
# A pipeline stage takes the larger of TP x CP (the dense part) and EP x ETP (the experts)
# processes; the smaller must divide it, since both parts share the processes.
count_processes() {
  local name all=
  [[ "${DP:-}" != all ]] || all=1 DP=1
  for name in TP PP CP EP DP; do
    printf -v "$name" '%s' "${!name:-1}"
  done
  ETP=${ETP:-$TP}
  for name in TP PP CP EP ETP DP; do
    [[ "${!name}" =~ ^[1-9][0-9]{0,4}$ ]] || fail "$name=${!name}" \
      "a parallel size is a whole number from 1 to 99999; DP may also be all" "$name=1"
  done
  local dense=$((TP * CP)) experts=$((EP * ETP)) larger
  larger=$((dense > experts ? dense : experts))
  if ((larger * DP % dense || larger * DP % experts)); then
    fail "TP=$TP CP=$CP EP=$EP ETP=$ETP DP=$DP" \
      "TP x CP = $dense and EP x ETP = $experts share processes, and neither divides the other" \
      "choose EP x ETP as a divisor or a multiple of TP x CP; ETP=1 is often right"
  fi
  [[ -z "$all" ]] || DP=$(replicas "$((larger * PP))")
  WORLD=$((larger * DP * PP))
  FLAGS+=(
    --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP"
    --context-parallel-size "$CP" --expert-model-parallel-size "$EP"
    --expert-tensor-parallel-size "$ETP"
  )
}

# replicas PROCESSES: print how many replicas of a model of that many processes the GPUs of all
# nodes hold, with equally many processes on each node. Without GPUs: the fewest that use every
# node.
replicas() {
  local gpus=${GPUS_PER_NODE:-0} order count
  ((gpus > 0)) || gpus=$(visible_gpus)
  order=$(seq "$NNODES")
  ((gpus == 0)) || order=$(seq $((gpus * NNODES / $1)) -1 1)
  for count in $order 1; do
    ((count * $1 % NNODES)) || break
  done
  echo "$count"
}

visible_gpus() {
  if [[ -n "${CUDA_VISIBLE_DEVICES+set}" ]]; then
    tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c . || true
  else
    { nvidia-smi --list-gpus 2>/dev/null || true; } | grep -c '^GPU ' || true
  fi
}

# find_nodes: set NNODES, the number of nodes.
find_nodes() {
  local step=${SLURM_STEP_ID:+${SLURM_STEP_NUM_NODES:-}} name
  NNODES=${NNODES:-${PET_NNODES:-${step:-1}}}
  [[ "$NNODES" =~ ^[1-9][0-9]{0,4}$ ]] ||
    fail "NNODES=$NNODES" "it is not a whole number from 1 to 99999" "NNODES=1"
  [[ "${GPUS_PER_NODE:-0}" =~ ^[0-9]{1,3}$ ]] ||
    fail "GPUS_PER_NODE=$GPUS_PER_NODE" "it is not a whole number" "GPUS_PER_NODE=8"
}

# check_nodes: fail unless the processes can be spread over the nodes.
check_nodes() {
  local gpus=${GPUS_PER_NODE:-0} layout
  local sizes="TP=$TP PP=$PP CP=$CP EP=$EP ETP=$ETP DP=$DP"
  layout="$(counted "$WORLD" process processes) on $(counted "$NNODES" node nodes)"
  ((WORLD % NNODES == 0)) || fail "$layout ($sizes)" \
    "every node gets the same number of processes, and $NNODES does not divide $WORLD" \
    "choose other sizes, or a number of nodes that divides $WORLD"
  ((gpus == 0 || WORLD / NNODES <= gpus)) || fail \
    "$layout with $(counted "$gpus" GPU GPUs) each ($sizes)" \
    "each process needs a GPU, and the nodes have $((NNODES * gpus))" \
    "take $(((WORLD + gpus - 1) / gpus)) nodes, or smaller sizes"
}

# choose_launcher PLANNED: set LAUNCHER, the words that start the stage's processes on this node. If
# PLANNED is not empty, nothing is started, and the address of the first node is not looked up.
choose_launcher() {
  local tasks=${SLURM_STEP_ID:+${SLURM_STEP_NUM_TASKS:-}} meeting
  local outside=${RANK:+${WORLD_SIZE:-}} # processes, where torchrun or a scheduler started this one
  # Processes share the node's cores; a single one uses all it may
  # (post_training/common/threads.py).
  ((WORLD == 1)) || export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
  LAUNCHER=()
  # Left over in the shell, they make a process wait for others that nobody starts.
  if [[ -n "$outside" && "$outside" != "$WORLD" ]] &&
    [[ "${LAUNCH_SCRIPT:-}" == python* || (-z "${LAUNCH_SCRIPT:-}" && $WORLD -eq 1) ]]; then
    fail "RANK=$RANK WORLD_SIZE=$outside" "the layout has $(counted "$WORLD" process processes)" \
      "unset RANK WORLD_SIZE, or start as many processes as the layout has"
  fi
  if [[ -n "${LAUNCH_SCRIPT:-}" ]]; then
    if [[ "$LAUNCH_SCRIPT" == python* && ${tasks:-1} -gt 1 && $tasks -ne $WORLD ]]; then
      fail "$tasks tasks in this SLURM step" "the layout has $WORLD processes, a task each" \
        "srun --ntasks=$WORLD"
    fi
    to_array LAUNCHER LAUNCH_SCRIPT
    # The interpreter that passed the checks, not the first on the PATH.
    [[ "${LAUNCHER[0]}" != python ]] || LAUNCHER[0]=$PYTHON
    return
  fi
  LAUNCHER=("$PYTHON")
  ((WORLD > 1)) || return 0
  LAUNCHER+=(-P -m torch.distributed.run "--nproc_per_node=$((WORLD / NNODES))")
  if [[ -n "${PET_RDZV_ENDPOINT:-}${PET_MASTER_ADDR:-}" ]]; then
    return 0 # torchrun's own variables give the rendezvous
  elif ((NNODES == 1)); then
    LAUNCHER+=(--standalone) # a port of its own: two jobs on a machine must not collide
  else
    if [[ -n "$1" ]]; then
      meeting=("${MASTER_ADDR:-FIRST_NODE}" "${MASTER_PORT:-PORT}")
    else
      read -ra meeting <<<"$(cd "$SCRIPT_DIR" && "$PYTHON" -m post_training.placement)" || exit 2
      [[ -n "${meeting[1]:-}" ]] || exit 2
    fi
    LAUNCHER+=("--nnodes=$NNODES" "--node_rank=${NODE_RANK:-${SLURM_NODEID:-0}}"
      "--master_addr=${meeting[0]}" "--master_port=${meeting[1]}")
  fi
}

# launch STAGE [FLAGS...]: run the checks, then exec the stage's processes.
launch() {
  local stage=$1 planned=
  shift
  find_nodes
  ! asks_server || TP=1 PP=1 CP=1 EP=1 ETP=1 DP=1
  count_processes
  check_nodes
  local arguments=("${FLAGS[@]}" "$@")
  to_array arguments MLM_EXTRA_ARGS
  arguments+=("${REST[@]}")
  case "${MLM_LAUNCH:-}" in
    count) echo "$WORLD" && exit 0 ;;
    words) printf '%s\0' "$stage.py" "${arguments[@]}" && exit 0 ;;
    check) planned=1 ;;
  esac
  ! has_word --dry-run "${arguments[@]}" || planned=1
  choose_launcher "$planned"
  local line=("${LAUNCHER[@]}" "$SCRIPT_DIR/$stage.py" "${arguments[@]}")
  # Reports a mistake once, within a second, instead of from every process of a job.
  MLM_PLANNED_PROCESSES=$WORLD MLM_PLANNED_NODES=$NNODES MLM_LAUNCH_LINE="${line[*]@Q}" \
    "$PYTHON" "$SCRIPT_DIR/$stage.py" "${arguments[@]}" --check
  [[ -z "$planned" ]] || exit 0
  export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
  # Megatron overlaps communication by the order of kernel launches on one connection.
  export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
  exec "${line[@]}"
}
