#!/usr/bin/env bash
# Quantize a model after training, and save it as a Megatron checkpoint, or export it at once.
#
#   bash quantize.sh <conf> [configuration] [flags]
#   HF_MODEL_CKPT=/models/Qwen3-0.6B bash quantize.sh Qwen/Qwen3-0.6B FP8_DEFAULT_CFG
#   MLM_MODEL_CKPT=/work/q bash quantize.sh Qwen/Qwen3-0.6B auto --auto-quantize-bits 5.0
#   HF_MODEL_CKPT=/models/in EXPORT_DIR=/models/out bash quantize.sh Qwen/Qwen3-0.6B nvfp4
#
#   configuration   a name (default: FP8_DEFAULT_CFG), a recipe (with a / or ending in .yaml or
#                   .yml), or auto
#   MLM_MODEL_CKPT  Megatron checkpoint; else HF_MODEL_CKPT, a Hugging Face folder or hub name
#   MLM_MODEL_SAVE  where to save (default: $MLM_WORK_DIR/<conf>_quant, or not with EXPORT_DIR)
#   EXPORT_DIR      write the folder of export.sh too, in the same process (TP=1 EP=1)
#   MLM_PROMPTS, MLM_REF_LABEL  prompts and expected texts of the smoke generation, split by |
#
# Further variables: conf/arguments.sh. All flags: bash quantize.sh --help
set -euo pipefail
SCRIPT_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=conf/arguments.sh
source "$SCRIPT_DIR/conf/arguments.sh"

start quantize "$@"
configuration=FP8_DEFAULT_CFG
if [[ -n "${REST[0]:-}" && "${REST[0]}" != -* ]]; then
  configuration=${REST[0]}
  REST=("${REST[@]:1}")
fi
case "$configuration" in
  */* | *.yaml | *.yml) flags=(--recipe "$configuration") ;;
  auto | AUTO | auto_quantize) flags=(--export-quant-cfg auto) ;;
  *) flags=(--export-quant-cfg "$configuration") ;;
esac
[[ -z "${EXPORT_DIR:-}" ]] || flags+=(--export-dir "$EXPORT_DIR")
[[ -z "${MLM_MODEL_SAVE:-}" && -n "${EXPORT_DIR:-}" ]] ||
  flags+=(--save "${MLM_MODEL_SAVE:-$MLM_WORK_DIR/${MLM_MODEL_CFG}_quant}")
[[ -z "${MLM_MODEL_CKPT:-}" ]] || flags+=(--load "$MLM_MODEL_CKPT")
[[ -z "${MLM_PROMPTS:-}" ]] || flags+=("--prompts=$MLM_PROMPTS")
[[ -z "${MLM_REF_LABEL:-}" ]] || flags+=("--references=$MLM_REF_LABEL")
launch quantize "${flags[@]}" --pretrained-model-path "$HF_MODEL_CKPT"
