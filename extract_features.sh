#!/usr/bin/env bash
# Store the hidden states of a model, to train a draft for it without running it (eagle3.sh
# --offline-distillation-data). Says how much disk and time that takes before it starts.
#
#   bash extract_features.sh <conf> --output-dir DIR [flags]
#   HF_MODEL_CKPT=/models/Qwen3-0.6B bash extract_features.sh Qwen/Qwen3-0.6B \
#     --finetune-data-files /data/answers.jsonl --output-dir /data/features
#
#   MLM_MODEL_CKPT  Megatron checkpoint; else HF_MODEL_CKPT, a Hugging Face folder or hub name
#   DATASET         conversations: a name on the hub, a file or a folder
#   MLM_DATA_ARGS   flags that name the conversations
#
# Further variables: conf/arguments.sh. All flags: bash extract_features.sh --help
set -euo pipefail
SCRIPT_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=conf/arguments.sh
source "$SCRIPT_DIR/conf/arguments.sh"

start extract_features "$@"
flags=()
[[ -z "${MLM_MODEL_CKPT:-}" ]] || flags+=(--load "$MLM_MODEL_CKPT")
flags+=(--pretrained-model-path "$HF_MODEL_CKPT")
[[ -z "${DATASET:-}" ]] || flags+=(--finetune-hf-dataset "$DATASET")
to_array flags MLM_DATA_ARGS
launch extract_features "${flags[@]}"
