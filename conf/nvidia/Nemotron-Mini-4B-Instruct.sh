#!/usr/bin/env bash
# https://huggingface.co/nvidia/Nemotron-Mini-4B-Instruct
export MODEL_ARGS=(
  --bf16
  --num-layers 32
  --hidden-size 3072
  --ffn-hidden-size 9216
  --num-attention-heads 24
  --group-query-attention --num-query-groups 8
  --kv-channels 128
  --disable-bias-linear
  --squared-relu
  --normalization LayerNorm --apply-layernorm-1p --norm-epsilon 1e-5
  --position-embedding-type rope --rotary-base 10000 --rotary-percent 0.5
  --untie-embeddings-and-output-weights
  --max-position-embeddings 4096
  --padded-vocab-size 256000
)
