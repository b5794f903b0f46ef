#!/usr/bin/env bash
# https://huggingface.co/nvidia/NVIDIA-Nemotron-Nano-9B-v2-Base
export MODEL_ARGS=(
  --bf16
  --num-layers 56
  --hidden-size 4480
  --ffn-hidden-size 15680
  --num-attention-heads 40
  --group-query-attention --num-query-groups 8
  --kv-channels 128
  --export-model-type HybridModel --is-hybrid-model
  --hybrid-layer-pattern 'M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-'
  --mamba-num-heads 128 --mamba-head-dim 80
  --mamba-num-groups 8 --mamba-state-dim 128
  --disable-bias-linear
  --squared-relu
  --normalization RMSNorm --norm-epsilon 1e-5
  --position-embedding-type none
  --untie-embeddings-and-output-weights
  --max-position-embeddings 131072
  --padded-vocab-size 131072
)
