#!/usr/bin/env bash
# https://huggingface.co/Qwen/Qwen3-0.6B
export MODEL_ARGS=(
  --bf16
  --num-layers 28
  --hidden-size 1024
  --ffn-hidden-size 3072
  --num-attention-heads 16
  --group-query-attention --num-query-groups 8
  --kv-channels 128
  --qk-layernorm
  --disable-bias-linear
  --swiglu
  --normalization RMSNorm --norm-epsilon 1e-6
  --position-embedding-type rope --rotary-base 1000000 --rotary-percent 1.0
  --max-position-embeddings 40960
  --padded-vocab-size 151936
)
