#!/usr/bin/env bash
# Measure a draft: acceptance length, equality with greedy decoding, speed-up.
#
#   MLM_MODEL_CKPT=/work/Qwen3-0.6B-Eagle3 bash validate.sh <conf> [flags]
#   MLM_MODEL_CKPT=/work/Qwen3-0.6B-Eagle3 STEPS=3 OSL=128 PROMPTS_PATH=question.jsonl \
#     bash validate.sh Qwen/Qwen3-0.6B
#
#   MLM_MODEL_CKPT  checkpoint with a draft (default: $MLM_WORK_DIR/<conf>-Eagle3)
#   PROMPTS_PATH    prompts: a file, a folder or a hub name (default: MT-Bench from the hub)
#   OSL             most tokens of an answer (default: 64)
#   STEPS           draft tokens at a time (default: 1)
#   GT_PATH         ground truth of an earlier run, to compare with; it has prompts too
#   SERVER          a server whose engine has a draft, to ask instead of decoding here
#   SAVE_GT_PATH    where to save this run's ground truth
#
# Further variables: conf/arguments.sh. All flags: bash validate.sh --help
set -euo pipefail
SCRIPT_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=conf/arguments.sh
source "$SCRIPT_DIR/conf/arguments.sh"

start validate "$@"
flags=(--osl "${OSL:-64}" --steps "${STEPS:-1}")
[[ -z "${PROMPTS_PATH:-}" ]] || flags+=(--prompts-path "$PROMPTS_PATH")
[[ -z "${GT_PATH:-}" ]] || flags+=(--ground-truth-path "$GT_PATH")
[[ -z "${SAVE_GT_PATH:-}" ]] || flags+=(--save-ground-truth-path "$SAVE_GT_PATH")
model_flags flags "$MLM_WORK_DIR/${MLM_MODEL_CFG}-Eagle3"
launch validate "${flags[@]}"
