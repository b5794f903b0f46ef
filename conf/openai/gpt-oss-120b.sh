#!/usr/bin/env bash
# https://huggingface.co/openai/gpt-oss-120b
export MODEL_ARGS=(
  --bf16
  --num-layers 36
  --hidden-size 2880
  --ffn-hidden-size 2880
  --num-attention-heads 64
  --group-query-attention --num-query-groups 8
  --kv-channels 64
  --quick-geglu --glu-linear-offset 1.0 --activation-func-clamp-value 7.0
  --softmax-type learnable
  --window-size '127,0' --window-attn-skip-freq 2
  --normalization RMSNorm --norm-epsilon 1e-5
  --enable-gpt-oss --rotary-base 150000 --rotary-percent 1.0
  --num-experts 128 --moe-layer-freq '[1]*36'
  --moe-ffn-hidden-size 2880
  --moe-router-topk 4 --moe-router-dtype fp32
  --max-position-embeddings 131072
  --padded-vocab-size 201088
  --untie-embeddings-and-output-weights
)
