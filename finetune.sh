#!/usr/bin/env bash
# Fine-tune a model on conversations (SFT); a quantized one is trained with its quantizers in place
# (QAT). Of a checkpoint with a draft the draft is trained instead, as eagle3.sh does.
#
#   bash finetune.sh <conf> [flags]
#   MLM_MODEL_CKPT=/work/m_quant bash finetune.sh Qwen/Qwen3-8B --finetune-data-files /data/chat.jsonl
#   MLM_MODEL_CKPT=/work/Qwen3-0.6B-Eagle3 bash finetune.sh Qwen/Qwen3-0.6B \
#     --offline-distillation-data /data/features
#
#   MLM_MODEL_CKPT  Megatron checkpoint (without one HF_MODEL_CKPT is fine-tuned)
#   MLM_MODEL_SAVE  where checkpoints go (default: $MLM_WORK_DIR/<conf>_finetuned, of a draft
#                   MLM_MODEL_CKPT); a run that is there is continued
#   DATASET         what to train on: a name on the hub, a file or a folder
#   MLM_DATA_ARGS MLM_TRAIN_ARGS MLM_OPTIM_ARGS MLM_EVAL_ARGS MLM_RESUME_ARGS
#                   groups of training flags; what they leave out has the defaults of --help
#
# Exit code 75: ended by SIGTERM, SIGUSR1 or a limit, and saved; the same command resumes.
# Further variables: conf/arguments.sh. All flags: bash finetune.sh --help
set -euo pipefail
# A time limit may be near before the stage itself can note it; torchrun must not end of it either.
trap '' USR1
trap 'exit 75' TERM
SCRIPT_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=conf/arguments.sh
source "$SCRIPT_DIR/conf/arguments.sh"

start finetune "$@"
if has_draft "${MLM_MODEL_CKPT:-}" "$@"; then
  require MLM_MODEL_CKPT "the checkpoint with the draft to train"
  export MLM_MODEL_CKPT MLM_MODEL_SAVE=${MLM_MODEL_SAVE:-$MLM_MODEL_CKPT}
  exec bash "$SCRIPT_DIR/eagle3.sh" "$@" --no-new-draft
fi
flags=(--save "${MLM_MODEL_SAVE:-$MLM_WORK_DIR/${MLM_MODEL_CFG}_finetuned}")
[[ -z "${MLM_MODEL_CKPT:-}" ]] || flags+=(--load "$MLM_MODEL_CKPT")
[[ -z "${DATASET:-}" ]] || flags+=(--finetune-hf-dataset "$DATASET")
for group in MLM_DATA_ARGS MLM_TRAIN_ARGS MLM_OPTIM_ARGS MLM_EVAL_ARGS MLM_RESUME_ARGS; do
  to_array flags "$group"
done
launch finetune "${flags[@]}" --pretrained-model-path "$HF_MODEL_CKPT"
