#!/usr/bin/env bash
# https://huggingface.co/deepseek-ai/DeepSeek-V2-Lite
export MODEL_ARGS=(
  --bf16
  --num-layers 27
  --hidden-size 2048
  --ffn-hidden-size 10944
  --num-attention-heads 16
  --multi-latent-attention
  --kv-lora-rank 512
  --qk-head-dim 128 --qk-pos-emb-head-dim 64 --v-head-dim 128
  --qk-layernorm
  --disable-bias-linear
  --swiglu
  --normalization RMSNorm --norm-epsilon 1e-6
  --position-embedding-type rope --rotary-base 10000 --rotary-percent 1.0
  --rope-type yarn --rotary-scaling-factor 40 --original-max-position-embeddings 4096
  --beta-fast 32 --beta-slow 1 --mscale 0.707 --mscale-all-dim 0.707
  --num-experts 64 --moe-layer-freq '[0]*1+[1]*26'
  --moe-ffn-hidden-size 1408 --moe-shared-expert-intermediate-size 2816
  --moe-router-topk 6
  --moe-router-score-function softmax
  --moe-router-pre-softmax --moe-router-topk-scaling-factor 1.0
  --moe-router-dtype fp32
  --max-position-embeddings 163840
  --padded-vocab-size 102400
  --untie-embeddings-and-output-weights
)
