#!/usr/bin/env bash
# https://huggingface.co/meta-llama/Llama-3.1-405B-Instruct
export MODEL_ARGS=(
  --bf16
  --num-layers 126
  --hidden-size 16384
  --ffn-hidden-size 53248
  --num-attention-heads 128
  --group-query-attention --num-query-groups 8
  --kv-channels 128
  --disable-bias-linear
  --swiglu
  --normalization RMSNorm --norm-epsilon 1e-5
  --position-embedding-type rope --rotary-base 500000 --rotary-percent 1.0
  --use-rope-scaling --rope-scaling-factor 8
  --max-position-embeddings 131072
  --padded-vocab-size 128256
  --untie-embeddings-and-output-weights
)
