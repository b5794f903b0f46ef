#!/usr/bin/env bash
# The whole workflow on a tiny model, from a fresh clone, on CPU or GPU:
# set up, train, convert, score, quantize (FP8), score, export, read back, answer, report.
#
# usage: bash quickstart.sh [--all]
#   --all  also prune -> distill -> score, and train an EAGLE-3 draft -> validate -> export
#
# environment:
#   MLM_WORK_DIR  work folder (default: megatron_workspace/quickstart in the temporary folder)
#
# About 3 minutes on 2 cores after installation, 7 with --all. A second run reuses what is still
# valid. On another kind of CPU, or with OMP_NUM_THREADS set, scores differ by a few percent.
set -euo pipefail

all=
if [[ "$*" == --all ]]; then
  all=yes
elif (($# > 0)); then
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" >&2
  [[ $1 == --help || $1 == -h ]] && exit 0
  exit 2
fi
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$here"
# shellcheck source=conf/environment.sh
source conf/environment.sh
setup_environment

MLM_WORK_DIR=${MLM_WORK_DIR:-${TMPDIR:-/tmp}/megatron_workspace/quickstart}
export MLM_WORK_DIR
work=$MLM_WORK_DIR
mkdir -p "$work"
conf=quickstart/tiny
question="What is the capital of Arvon?"

say() { printf '\n== %s\n' "$*" >&2; }

# made TITLE OUTPUT INPUT COMMAND...: run a stage unless its output is complete and from this input.
made() {
  local title=$1 output=$2 input=$3
  shift 3
  if "$PYTHON" -m post_training.manifest valid "$output" "$input"; then
    say "$title: $output is still valid and is reused"
  else
    say "$title"
    env "$@"
  fi
}

# score TITLE CHECKPOINT RESULT: score a checkpoint unless that is done.
score() {
  if [[ $3 -nt $2/run.json ]]; then
    say "$1: $3 is still valid and is reused"
  else
    say "$1"
    MLM_MODEL_CKPT=$2 bash mmlu.sh "$conf" --mmlu-dataset "$work/tiny/data/mmlu" \
      --mmlu-batch-size 16 --mmlu-output "$3"
  fi
}

say "train a tiny Qwen3 that knows a small world of facts"
"$PYTHON" -m quickstart.train --output "$work/tiny" --force
made "convert: Hugging Face -> Megatron" "$work/tiny_mlm" "$work/tiny" \
  HF_MODEL_CKPT="$work/tiny" MLM_MODEL_SAVE="$work/tiny_mlm" \
  bash convert.sh "$conf" --overwrite
score "mmlu: score in BF16" "$work/tiny_mlm" "$work/mmlu_bf16.json"
made "quantize: FP8" "$work/tiny_quant" "$work/tiny_mlm" \
  MLM_MODEL_CKPT="$work/tiny_mlm" MLM_MODEL_SAVE="$work/tiny_quant" \
  bash quantize.sh "$conf" FP8_DEFAULT_CFG --overwrite \
  --calib-dataset-path-or-name "$work/tiny/data/chat.jsonl" \
  --calib-size 32 --calib-max-sequence-length 256 --calib-batch-size 4
score "mmlu: score in FP8" "$work/tiny_quant" "$work/mmlu_fp8.json"
made "export: Megatron -> Hugging Face, read back and compared" "$work/tiny_export" \
  "$work/tiny_quant" \
  MLM_MODEL_CKPT="$work/tiny_quant" EXPORT_DIR="$work/tiny_export" \
  bash export.sh "$conf" --overwrite
say "read back: the exported folder answers"
"$PYTHON" -m post_training.answer "$work/tiny_export" "$question"

# A smaller model: prune widths and layers, then distill from the original.
prune_and_distill() {
  made "prune: widths and layers" "$work/tiny_pruned" "$work/tiny_mlm" \
    MLM_MODEL_CKPT="$work/tiny_mlm" MLM_MODEL_SAVE="$work/tiny_pruned" \
    bash prune.sh "$conf" --overwrite --skip-generate \
    --prune-export-config '{"hidden_size": 96, "ffn_hidden_size": 192, "num_layers": 4}' \
    --calib-dataset "$work/tiny/data/chat.jsonl" \
    --calib-size 32 --calib-max-sequence-length 256 --calib-batch-size 8
  score "mmlu: score of the pruned model" "$work/tiny_pruned" "$work/mmlu_pruned.json"
  "$PYTHON" -m quickstart.practice --output "$work/practice.jsonl"
  made "distill: the pruned model learns from the original" "$work/tiny_distilled" \
    "$work/tiny_pruned" \
    TEACHER_CKPT="$work/tiny_mlm" MLM_MODEL_CKPT="$work/tiny_pruned" \
    MLM_MODEL_SAVE="$work/tiny_distilled" \
    bash distill.sh "$conf" --overwrite \
    --finetune-data-files "$work/tiny/data/chat.jsonl" "$work/practice.jsonl" \
    --train-iters 100 --seq-length 256 --micro-batch-size 8 --lr 2e-3 --min-lr 1e-4 \
    --log-interval 25
  score "mmlu: score of the distilled model" "$work/tiny_distilled" "$work/mmlu_distilled.json"
}

# A faster model: a draft proposes tokens, which the model verifies.
draft() {
  made "eagle3: train a draft" "$work/tiny_eagle3" "$work/tiny_mlm" \
    MLM_MODEL_CKPT="$work/tiny_mlm" MLM_MODEL_SAVE="$work/tiny_eagle3" \
    bash eagle3.sh "$conf" --overwrite \
    --finetune-data-files "$work/tiny/data/chat.jsonl" \
    --seq-length 256 --train-iters 400 --global-batch-size 4 --micro-batch-size 4 \
    --lr 5e-3 --min-lr 1e-5 --lr-warmup-iters 20 \
    --log-interval 50 --eval-interval 400 --save-interval 400 --eval-iters 2
  if [[ $work/validate.json -nt $work/tiny_eagle3/run.json ]]; then
    say "validate: $work/validate.json is still valid and is reused"
  else
    say "validate: how many of the draft's tokens the model accepts"
    # In float32 no two logits tie, so both ways of decoding give the same tokens.
    MLM_MODEL_CKPT="$work/tiny_eagle3" bash validate.sh "$conf" --fp32 --steps 3 \
      --prompts-path "$work/tiny/data/chat_heldout.jsonl" --validate-output "$work/validate.json" \
      --lower-bound 2.0 --require-identical
  fi
  made "export: the draft, read back and compared" "$work/tiny_eagle3_export" "$work/tiny_eagle3" \
    MLM_MODEL_CKPT="$work/tiny_eagle3" EXPORT_DIR="$work/tiny_eagle3_export" \
    bash export.sh "$conf" --export-extra-modules --overwrite
}

if [[ -n $all ]]; then
  prune_and_distill
  draft
fi
printf '\n'
"$PYTHON" -m quickstart.progress table "$work"
bash report.sh "$work"
