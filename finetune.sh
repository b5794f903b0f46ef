#!/usr/bin/env bash
# Train the draft of a checkpoint: Megatron-LM's name for the second half of eagle3.sh. A checkpoint
# without a draft is refused; fine-tuning the model itself (SFT, QAT) is not there yet.
#
#   MLM_MODEL_CKPT=/work/Qwen3-0.6B-Eagle3 bash finetune.sh Qwen/Qwen3-0.6B \
#     --offline-distillation-data /data/features
#
#   MLM_MODEL_CKPT  checkpoint with a draft (needed)
#   MLM_MODEL_SAVE  where checkpoints go (default: MLM_MODEL_CKPT)
#
# All else is as in eagle3.sh.
set -euo pipefail
trap '' USR1 # as in eagle3.sh
SCRIPT_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=conf/arguments.sh
source "$SCRIPT_DIR/conf/arguments.sh"

case "${1:-}" in -h | --help | --help-all) ;; *)
  read_set_up
  require MLM_MODEL_CKPT "the checkpoint with the draft to train"
  export MLM_MODEL_CKPT MLM_MODEL_SAVE=${MLM_MODEL_SAVE:-$MLM_MODEL_CKPT}
  set -- "$@" --no-new-draft
  ;;
esac
exec bash "$SCRIPT_DIR/eagle3.sh" "$@"
