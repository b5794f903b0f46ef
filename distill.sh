#!/usr/bin/env bash
# Distill a model into its pruned or quantized form, which learns to say what the teacher says.
#
#   bash distill.sh <conf> [flags]
#   TEACHER_CKPT=/work/m MLM_MODEL_CKPT=/work/m_pruned bash distill.sh Qwen/Qwen3-8B \
#     --finetune-data-files /data/text.jsonl
#
#   TEACHER_CKPT    the model before pruning: Megatron checkpoint, Hugging Face folder or hub name
#   MLM_MODEL_CKPT  the student, a Megatron checkpoint
#   MLM_MODEL_SAVE  where checkpoints go (default: $MLM_WORK_DIR/<conf>_distilled); a run that is
#                   there is continued
#   DATASET         what to train on: a name on the hub, a file or a folder
#   MLM_DATA_ARGS MLM_TRAIN_ARGS MLM_OPTIM_ARGS MLM_EVAL_ARGS MLM_RESUME_ARGS
#                   groups of training flags; what they leave out has the defaults of --help
#
# Exit code 75: ended by SIGTERM, SIGUSR1 or a limit, and saved; the same command resumes.
# Further variables: conf/arguments.sh. All flags: bash distill.sh --help
set -euo pipefail
# A time limit may be near before the stage itself can note it; torchrun must not end of it either.
trap '' USR1
trap 'exit 75' TERM
SCRIPT_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=conf/arguments.sh
source "$SCRIPT_DIR/conf/arguments.sh"

start distill "$@"
require MLM_MODEL_CKPT "the student, which prune.sh or quantize.sh saved,"
flags=(--load "$MLM_MODEL_CKPT")
flags+=(--save "${MLM_MODEL_SAVE:-$MLM_WORK_DIR/${MLM_MODEL_CFG}_distilled}")
[[ -z "${TEACHER_CKPT:-}" ]] || flags+=(--export-kd-teacher-load "$TEACHER_CKPT")
[[ -z "${BLEND_PATH:-}" ]] || flags+=(--per-split-data-args-path "$BLEND_PATH") # refused
[[ -z "${DATASET:-}" ]] || flags+=(--finetune-hf-dataset "$DATASET")
for group in MLM_DATA_ARGS MLM_TRAIN_ARGS MLM_OPTIM_ARGS MLM_EVAL_ARGS MLM_RESUME_ARGS; do
  to_array flags "$group"
done
launch distill "${flags[@]}" --pretrained-model-path "$HF_MODEL_CKPT"
