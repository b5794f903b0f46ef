#!/usr/bin/env bash
# https://huggingface.co/Qwen/Qwen3-30B-A3B
export MODEL_ARGS=(
  --bf16
  --num-layers 48
  --hidden-size 2048
  --ffn-hidden-size 6144
  --num-attention-heads 32
  --group-query-attention --num-query-groups 4
  --kv-channels 128
  --qk-layernorm
  --disable-bias-linear
  --swiglu
  --normalization RMSNorm --norm-epsilon 1e-6
  --position-embedding-type rope --rotary-base 1000000 --rotary-percent 1.0
  --num-experts 128 --moe-layer-freq '[1]*48'
  --moe-ffn-hidden-size 768
  --moe-router-topk 8
  --max-position-embeddings 40960
  --padded-vocab-size 151936
  --untie-embeddings-and-output-weights
)
