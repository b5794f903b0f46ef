#!/usr/bin/env bash
# https://huggingface.co/Qwen/Qwen2.5-0.5B-Instruct
export MODEL_ARGS=(
  --bf16
  --num-layers 24
  --hidden-size 896
  --ffn-hidden-size 4864
  --num-attention-heads 14
  --group-query-attention --num-query-groups 2
  --kv-channels 64
  --disable-bias-linear --add-qkv-bias
  --swiglu
  --normalization RMSNorm --norm-epsilon 1e-6
  --position-embedding-type rope --rotary-base 1000000 --rotary-percent 1.0
  --max-position-embeddings 32768
  --padded-vocab-size 151936
)
