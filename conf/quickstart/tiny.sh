#!/usr/bin/env bash
# The model that quickstart/train.py makes.
export MODEL_ARGS=(
  --bf16
  --num-layers 6
  --hidden-size 128
  --ffn-hidden-size 256
  --num-attention-heads 4
  --group-query-attention --num-query-groups 2
  --kv-channels 64
  --qk-layernorm
  --disable-bias-linear
  --swiglu
  --normalization RMSNorm --norm-epsilon 1e-6
  --position-embedding-type rope --rotary-base 1000000 --rotary-percent 1.0
  --padded-vocab-size 1024
)
