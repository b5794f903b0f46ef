#!/usr/bin/env bash
# https://huggingface.co/nvidia/Nemotron-H-4B-Instruct
export MODEL_ARGS=(
  --bf16
  --num-layers 52
  --hidden-size 3072
  --ffn-hidden-size 12288
  --num-attention-heads 32
  --group-query-attention --num-query-groups 8
  --kv-channels 128
  --export-model-type HybridModel --is-hybrid-model
  --hybrid-layer-pattern 'M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-'
  --mamba-num-heads 112 --mamba-head-dim 64
  --mamba-num-groups 8 --mamba-state-dim 128
  --disable-bias-linear
  --squared-relu
  --normalization RMSNorm --norm-epsilon 1e-5
  --position-embedding-type none
  --untie-embeddings-and-output-weights
  --max-position-embeddings 8192
  --padded-vocab-size 131072
)
