#!/usr/bin/env bash
# Search for the best quantization of a model within a budget of size or quality.
#
#   bash search.sh <conf> --max-size BYTES|--max-kl X --text FILE [flags]
#   HF_MODEL_CKPT=/models/Qwen3-8B bash search.sh Qwen/Qwen3-8B --max-size 6GB --gpu hopper \
#     --target vllm --text /data/wiki.txt
#
#   MLM_MODEL_CKPT  Megatron checkpoint; else HF_MODEL_CKPT, a Hugging Face folder or hub name
#   SEARCH_DIR      trials and report; a search resumes there (default: $MLM_WORK_DIR/<conf>_search)
#
# Further variables: conf/arguments.sh. All flags: bash search.sh --help
set -euo pipefail
SCRIPT_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=conf/arguments.sh
source "$SCRIPT_DIR/conf/arguments.sh"

start search "$@"
flags=(--conf "${1%.sh}" --search-dir "${SEARCH_DIR:-$MLM_WORK_DIR/${MLM_MODEL_CFG}_search}")
[[ -z "${MLM_MODEL_CKPT:-}" ]] || flags+=(--load "$MLM_MODEL_CKPT")
launch search "${flags[@]}" --pretrained-model-path "$HF_MODEL_CKPT"
