#!/usr/bin/env bash
# Score a model on MMLU, or on any multiple-choice questions in MMLU's columns.
#
#   bash mmlu.sh <conf> [flags]
#   MLM_MODEL_CKPT=/work/quant bash mmlu.sh Qwen/Qwen3-0.6B --fraction 0.05
#   HF_MODEL_CKPT=/models/Qwen3-0.6B bash mmlu.sh Qwen/Qwen3-0.6B --mmlu-dataset /data/mmlu
#
#   MLM_MODEL_CKPT  Megatron checkpoint; else HF_MODEL_CKPT, a Hugging Face folder or hub name
#   SERVER          an OpenAI-compatible server to ask instead of loading a model (SERVER_MODEL: which)
#
# Further variables: conf/arguments.sh. All flags: bash mmlu.sh --help
set -euo pipefail
SCRIPT_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=conf/arguments.sh
source "$SCRIPT_DIR/conf/arguments.sh"

start mmlu "$@"
flags=()
model_flags flags
launch mmlu "${flags[@]}"
