#!/usr/bin/env bash
# Megatron checkpoint -> Hugging Face folder that an inference engine loads.
#
#   MLM_MODEL_CKPT=/work/quant bash export.sh <conf> [flags]
#   MLM_MODEL_CKPT=/work/quant EXPORT_DIR=/models/out PP=2 bash export.sh Qwen/Qwen3-0.6B
#   bash export.sh --list-formats   # formats, engines and GPUs
#   MLM_MODEL_CKPT=/work/eagle3 bash export.sh Qwen/Qwen3-0.6B --export-extra-modules   # the draft
#
#   MLM_MODEL_CKPT  Megatron checkpoint to export (needed)
#   EXPORT_DIR      where to write (default: $MLM_WORK_DIR/<conf>_export, of a draft _draft)
#   HF_MODEL_CKPT   folder or hub name with configuration and tokenizer, for a checkpoint that
#                   carries none (default: the conf's name)
#
# TP, ETP and EP are always 1 here: the exporter writes each tensor whole. PP may be larger.
# Further variables: conf/arguments.sh. All flags: bash export.sh --help
set -euo pipefail
SCRIPT_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=conf/arguments.sh
source "$SCRIPT_DIR/conf/arguments.sh"

start export "$@"
require MLM_MODEL_CKPT "the Megatron checkpoint to export"
TP=1 ETP=1 EP=1 CP=1 DP=1
suffix="export"
words=("${REST[@]}")
to_array words MLM_EXTRA_ARGS
for word in --export-extra-modules --export-offline-model; do
  ! has_word "$word" "${words[@]}" || suffix="draft"
done
launch export --load "$MLM_MODEL_CKPT" --pretrained-model-name "$HF_MODEL_CKPT" \
  --export-dir "${EXPORT_DIR:-$MLM_WORK_DIR/${MLM_MODEL_CFG}_$suffix}"
