#!/usr/bin/env bash
# Answer prompts or whole conversations with a model; write OpenAI-form JSONL. Resumes when killed.
#
#   PROMPTS_PATH=prompts.jsonl bash generate.sh <conf> [flags]
#   MLM_MODEL_CKPT=/work/quant PROMPTS_PATH=chat.jsonl OUTPUT_PATH=/data/regenerated.jsonl \
#     bash generate.sh Qwen/Qwen3-0.6B --max-new-tokens 1024 --temperature 0.7
#
#   PROMPTS_PATH    prompts or conversations: a file, a folder or a hub name (MT-Bench's questions)
#   OUTPUT_PATH     where to write (default: $MLM_WORK_DIR/<conf>_generated.jsonl)
#   MLM_MODEL_CKPT  Megatron checkpoint; else HF_MODEL_CKPT, a Hugging Face folder or hub name
#   SERVER          an OpenAI-compatible server to ask instead of loading a model (SERVER_MODEL: which)
#
# Further variables: conf/arguments.sh. All flags: bash generate.sh --help
set -euo pipefail
SCRIPT_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=conf/arguments.sh
source "$SCRIPT_DIR/conf/arguments.sh"

start generate "$@"
flags=(--output "${OUTPUT_PATH:-$MLM_WORK_DIR/${MLM_MODEL_CFG}_generated.jsonl}")
[[ -z "${PROMPTS_PATH:-}" ]] || flags+=(--prompts-path "$PROMPTS_PATH")
[[ -z "${DRAFT_LEN:-}" ]] || flags+=(--draft-length "$DRAFT_LEN")
model_flags flags
launch generate "${flags[@]}"
