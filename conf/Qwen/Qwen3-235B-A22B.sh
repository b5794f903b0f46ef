#!/usr/bin/env bash
# https://huggingface.co/Qwen/Qwen3-235B-A22B
export MODEL_ARGS=(
  --bf16
  --num-layers 94
  --hidden-size 4096
  --ffn-hidden-size 12288
  --num-attention-heads 64
  --group-query-attention --num-query-groups 4
  --kv-channels 128
  --qk-layernorm
  --disable-bias-linear
  --swiglu
  --normalization RMSNorm --norm-epsilon 1e-6
  --position-embedding-type rope --rotary-base 1000000 --rotary-percent 1.0
  --num-experts 128 --moe-layer-freq '[1]*94'
  --moe-ffn-hidden-size 1536
  --moe-router-topk 8
  --max-position-embeddings 40960
  --padded-vocab-size 151936
  --untie-embeddings-and-output-weights
)
