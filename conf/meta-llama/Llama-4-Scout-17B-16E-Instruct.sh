#!/usr/bin/env bash
# https://huggingface.co/meta-llama/Llama-4-Scout-17B-16E-Instruct
# The text model. Chunks and temperature of attention come from config.json.
export MODEL_ARGS=(
  --bf16
  --num-layers 48
  --hidden-size 5120
  --ffn-hidden-size 16384
  --num-attention-heads 40
  --group-query-attention --num-query-groups 8
  --kv-channels 128
  --qk-layernorm --export-qk-l2-norm
  --disable-bias-linear
  --swiglu
  --normalization RMSNorm --norm-epsilon 1e-5
  --position-embedding-type rope --rotary-base 500000 --rotary-percent 1.0
  --rotary-interleaved --no-rope-freq 4
  --use-rope-scaling --rope-scaling-factor 16
  --num-experts 16 --moe-layer-freq '[1]*48'
  --moe-ffn-hidden-size 8192 --moe-shared-expert-intermediate-size 8192
  --moe-router-topk 1 --moe-router-score-function sigmoid
  --export-moe-apply-probs-on-input
  --max-position-embeddings 10485760
  --padded-vocab-size 202048
  --untie-embeddings-and-output-weights
)
