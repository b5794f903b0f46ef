#!/usr/bin/env bash
# https://huggingface.co/nvidia/NVIDIA-Nemotron-3-Ultra-550B-A55B-BF16
export MODEL_ARGS=(
  --bf16
  --num-layers 108
  --hidden-size 8192
  --ffn-hidden-size 5120
  --num-attention-heads 64
  --group-query-attention --num-query-groups 2
  --kv-channels 128
  --export-model-type HybridModel --is-hybrid-model
  --hybrid-layer-pattern 'MEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME'
  --mamba-num-heads 256 --mamba-head-dim 64
  --mamba-num-groups 8 --mamba-state-dim 128
  --disable-bias-linear
  --squared-relu
  --normalization RMSNorm --norm-epsilon 1e-5
  --position-embedding-type none
  --num-experts 512
  --moe-ffn-hidden-size 5120 --moe-shared-expert-intermediate-size 10240
  --moe-latent-size 2048
  --moe-router-topk 22 --moe-router-topk-scaling-factor 5.0
  --moe-router-score-function sigmoid --moe-router-pre-softmax
  --moe-router-enable-expert-bias --moe-router-dtype fp32
  --untie-embeddings-and-output-weights
  --max-position-embeddings 8192
  --padded-vocab-size 131072
)
