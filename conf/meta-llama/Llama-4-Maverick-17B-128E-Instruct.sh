#!/usr/bin/env bash
# https://huggingface.co/meta-llama/Llama-4-Maverick-17B-128E-Instruct
# The text model. Chunks and temperature of attention come from config.json.
export MODEL_ARGS=(
  --bf16
  --num-layers 48
  --hidden-size 5120
  --ffn-hidden-size 16384
  --num-attention-heads 40
  --group-query-attention --num-query-groups 8
  --kv-channels 128
  --disable-bias-linear
  --swiglu
  --normalization RMSNorm --norm-epsilon 1e-5
  --position-embedding-type rope --rotary-base 500000 --rotary-percent 1.0
  --rotary-interleaved --no-rope-freq 4
  --num-experts 128 --moe-layer-freq '[0,1]*24'
  --moe-ffn-hidden-size 8192 --moe-shared-expert-intermediate-size 8192
  --moe-router-topk 1 --moe-router-score-function sigmoid
  --export-moe-apply-probs-on-input
  --max-position-embeddings 1048576
  --padded-vocab-size 202048
  --untie-embeddings-and-output-weights
)
