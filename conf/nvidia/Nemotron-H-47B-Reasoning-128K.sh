#!/usr/bin/env bash
# https://huggingface.co/nvidia/Nemotron-H-47B-Reasoning-128K
export MODEL_ARGS=(
  --bf16
  --num-layers 98
  --hidden-size 8192
  --ffn-hidden-size 30720
  --num-attention-heads 64
  --group-query-attention --num-query-groups 8
  --kv-channels 128
  --export-model-type HybridModel --is-hybrid-model
  --hybrid-layer-pattern 'M-M-M-M-M-M-M-M-M*-M-M-M-M-M-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-M-M---MM---M-M*-M-M-M-M-M-'
  --mamba-num-heads 256 --mamba-head-dim 64
  --mamba-num-groups 8 --mamba-state-dim 256
  --disable-bias-linear
  --squared-relu
  --normalization RMSNorm --norm-epsilon 1e-5
  --position-embedding-type none
  --untie-embeddings-and-output-weights
  --max-position-embeddings 8192
  --padded-vocab-size 131072
)
