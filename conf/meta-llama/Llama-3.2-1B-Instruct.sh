#!/usr/bin/env bash
# https://huggingface.co/meta-llama/Llama-3.2-1B-Instruct
export MODEL_ARGS=(
  --bf16
  --num-layers 16
  --hidden-size 2048
  --ffn-hidden-size 8192
  --num-attention-heads 32
  --group-query-attention --num-query-groups 8
  --kv-channels 64
  --disable-bias-linear
  --swiglu
  --normalization RMSNorm --norm-epsilon 1e-5
  --position-embedding-type rope --rotary-base 500000 --rotary-percent 1.0
  --use-rope-scaling --rope-scaling-factor 32
  --max-position-embeddings 131072
  --padded-vocab-size 128256
)
