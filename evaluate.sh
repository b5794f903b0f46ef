#!/usr/bin/env bash
# Judge a model by text and questions, alone or beside a reference: what did a change cost?
#
#   bash evaluate.sh <conf> --text FILE --mmlu-dataset DIR [flags]
#   REFERENCE_CKPT=/work/m_mlm MLM_MODEL_CKPT=/work/m_quant bash evaluate.sh Qwen/Qwen3-8B \
#     --text /data/wiki.txt --max-kl 0.02
#
#   MLM_MODEL_CKPT  Megatron checkpoint; else HF_MODEL_CKPT, a Hugging Face folder or hub name
#   REFERENCE_CKPT  the model to compare with, of any of these kinds; none by default
#   SERVER          an OpenAI-compatible server to ask instead of loading a model (SERVER_MODEL: which)
#
# Further variables: conf/arguments.sh. All flags: bash evaluate.sh --help
set -euo pipefail
SCRIPT_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=conf/arguments.sh
source "$SCRIPT_DIR/conf/arguments.sh"

start evaluate "$@"
flags=()
[[ -z "${REFERENCE_CKPT:-}" ]] || flags+=(--reference "$REFERENCE_CKPT")
model_flags flags
launch evaluate "${flags[@]}"
