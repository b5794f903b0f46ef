#!/usr/bin/env bash
# https://huggingface.co/nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16
export MODEL_ARGS=(
  --bf16
  --num-layers 52
  --hidden-size 2688
  --ffn-hidden-size 1856
  --num-attention-heads 32
  --group-query-attention --num-query-groups 2
  --kv-channels 128
  --export-model-type HybridModel --is-hybrid-model
  --hybrid-layer-pattern 'MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME'
  --mamba-num-heads 64 --mamba-head-dim 64
  --mamba-num-groups 8 --mamba-state-dim 128
  --disable-bias-linear
  --squared-relu
  --normalization RMSNorm --norm-epsilon 1e-5
  --position-embedding-type none
  --num-experts 128
  --moe-ffn-hidden-size 1856 --moe-shared-expert-intermediate-size 3712
  --moe-router-topk 6 --moe-router-topk-scaling-factor 2.5
  --moe-router-score-function sigmoid --moe-router-pre-softmax
  --moe-router-enable-expert-bias --moe-router-dtype fp32
  --untie-embeddings-and-output-weights
  --max-position-embeddings 8192
  --padded-vocab-size 131072
)
