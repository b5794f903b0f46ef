#!/usr/bin/env bash
# Prune a model's widths and depth (Minitron), and save it as a Megatron checkpoint.
#
#   bash prune.sh <conf> [flags]
#   MLM_MODEL_CKPT=/work/m bash prune.sh Qwen/Qwen3-8B --prune-target-params 6e9
#   HF_MODEL_CKPT=/models/Qwen3-8B PP=2 bash prune.sh Qwen/Qwen3-8B \
#     --prune-export-config '{"hidden_size": 3584, "num_layers": 32}' --calib-dataset /data/text
#
#   MLM_MODEL_CKPT  Megatron checkpoint; else HF_MODEL_CKPT, a Hugging Face folder or hub name
#   MLM_MODEL_SAVE  where to save (default: $MLM_WORK_DIR/<conf>_pruned)
#   MLM_PROMPTS, MLM_REF_LABEL  prompts and expected texts of the smoke generation, split by |
#
# TP and DP are 1; PP may be larger. The pruned model needs distillation: distill.sh.
# Further variables: conf/arguments.sh. All flags: bash prune.sh --help
set -euo pipefail
SCRIPT_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=conf/arguments.sh
source "$SCRIPT_DIR/conf/arguments.sh"

start prune "$@"
[[ "${DP:-1}" == 1 ]] || fail "DP=$DP" "pruning runs on one replica" "DP=1; PP may be larger"
flags=(--save "${MLM_MODEL_SAVE:-$MLM_WORK_DIR/${MLM_MODEL_CFG}_pruned}")
[[ -z "${MLM_MODEL_CKPT:-}" ]] || flags+=(--load "$MLM_MODEL_CKPT")
[[ -z "${MLM_PROMPTS:-}" ]] || flags+=("--prompts=$MLM_PROMPTS")
[[ -z "${MLM_REF_LABEL:-}" ]] || flags+=("--references=$MLM_REF_LABEL")
launch prune "${flags[@]}" --pretrained-model-path "$HF_MODEL_CKPT"
