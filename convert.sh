#!/usr/bin/env bash
# Hugging Face -> Megatron checkpoint; or Megatron checkpoint -> another layout.
#
#   bash convert.sh <conf> [flags]
#   HF_MODEL_CKPT=/models/Qwen3-0.6B TP=2 bash convert.sh Qwen/Qwen3-0.6B
#   MLM_MODEL_CKPT=/work/a MLM_MODEL_SAVE=/work/b PP=2 bash convert.sh Qwen/Qwen3-0.6B
#   MLM_MODEL_CKPT=/work/quant bash convert.sh Qwen/Qwen3-0.6B --algorithm eagle3
#
#   HF_MODEL_CKPT   Hugging Face folder or hub name (default: the conf's name)
#   MLM_MODEL_CKPT  Megatron checkpoint, taken instead
#   MLM_MODEL_SAVE  where to save (default: $MLM_WORK_DIR/<conf>_mlm)
#
# Further variables: conf/arguments.sh. All flags: bash convert.sh --help
set -euo pipefail
SCRIPT_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=conf/arguments.sh
source "$SCRIPT_DIR/conf/arguments.sh"

start convert "$@"
flags=(--save "${MLM_MODEL_SAVE:-$MLM_WORK_DIR/${MLM_MODEL_CFG}_mlm}")
[[ -z "${MLM_MODEL_CKPT:-}" ]] || flags+=(--load "$MLM_MODEL_CKPT")
launch convert "${flags[@]}" --pretrained-model-path "$HF_MODEL_CKPT"
