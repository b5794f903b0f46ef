#!/usr/bin/env bash
# https://huggingface.co/Qwen/Qwen2.5-7B-Instruct
export MODEL_ARGS=(
  --bf16
  --num-layers 28
  --hidden-size 3584
  --ffn-hidden-size 18944
  --num-attention-heads 28
  --group-query-attention --num-query-groups 4
  --kv-channels 128
  --disable-bias-linear --add-qkv-bias
  --swiglu
  --normalization RMSNorm --norm-epsilon 1e-6
  --position-embedding-type rope --rotary-base 1000000 --rotary-percent 1.0
  --max-position-embeddings 32768
  --padded-vocab-size 152064
  --untie-embeddings-and-output-weights
)
