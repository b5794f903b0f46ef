#!/usr/bin/env bash
# Train an EAGLE-3 draft for a model. A draft is attached first where there is none.
#
#   bash eagle3.sh <conf> [flags]
#   HF_MODEL_CKPT=/models/Qwen3-0.6B bash eagle3.sh Qwen/Qwen3-0.6B \
#     --finetune-data-files /data/answers.jsonl
#
#   MLM_MODEL_CKPT  Megatron checkpoint, e.g. a quantized one; else HF_MODEL_CKPT, a Hugging Face
#                   folder or hub name
#   MLM_MODEL_SAVE  where checkpoints go (default: $MLM_WORK_DIR/<conf>-Eagle3); a run that is there
#                   is continued, a draft that convert.sh attached there is trained
#   DATASET         what to train on: a name on the hub, a file or a folder
#   MLM_DATA_ARGS MLM_TRAIN_ARGS MLM_OPTIM_ARGS MLM_EVAL_ARGS MLM_RESUME_ARGS
#                   groups of training flags; what they leave out has the defaults of --help: 128000
#                   sequences, cosine from 5e-5 to 1e-7, checkpoint and evaluation every 1000
#
# Exit code 75: ended by SIGTERM, SIGUSR1 or a limit, and saved; the same command resumes.
# Further variables: conf/arguments.sh. All flags: bash eagle3.sh --help
set -euo pipefail
# A time limit may be near before the stage itself can note it; torchrun must not end of it either.
trap '' USR1
trap 'exit 75' TERM
SCRIPT_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=conf/arguments.sh
source "$SCRIPT_DIR/conf/arguments.sh"

start eagle3 "$@"
flags=(--save "${MLM_MODEL_SAVE:-$MLM_WORK_DIR/$MLM_MODEL_CFG-Eagle3}")
[[ -z "${MLM_MODEL_CKPT:-}" ]] || flags+=(--load "$MLM_MODEL_CKPT")
flags+=(--pretrained-model-path "$HF_MODEL_CKPT")
[[ -z "${DATASET:-}" ]] || flags+=(--finetune-hf-dataset "$DATASET")
for group in MLM_DATA_ARGS MLM_TRAIN_ARGS MLM_OPTIM_ARGS MLM_EVAL_ARGS MLM_RESUME_ARGS; do
  to_array flags "$group"
done
launch eagle3 "${flags[@]}"
