#!/usr/bin/env bash
# https://huggingface.co/deepseek-ai/DeepSeek-R1
export MODEL_ARGS=(
  --bf16
  --num-layers 61
  --hidden-size 7168
  --ffn-hidden-size 18432
  --num-attention-heads 128
  --multi-latent-attention
  --q-lora-rank 1536 --kv-lora-rank 512
  --qk-head-dim 128 --qk-pos-emb-head-dim 64 --v-head-dim 128
  --qk-layernorm
  --disable-bias-linear
  --swiglu
  --normalization RMSNorm --norm-epsilon 1e-6
  --position-embedding-type rope --rotary-base 10000 --rotary-percent 1.0
  --rope-type yarn --rotary-scaling-factor 40 --original-max-position-embeddings 4096
  --beta-fast 32 --beta-slow 1 --mscale 1.0 --mscale-all-dim 1.0
  --num-experts 256 --moe-layer-freq '[0]*3+[1]*58'
  --moe-ffn-hidden-size 2048 --moe-shared-expert-intermediate-size 2048
  --moe-router-topk 8 --moe-router-num-groups 8 --moe-router-group-topk 4
  --moe-router-score-function sigmoid --moe-router-enable-expert-bias
  --moe-router-pre-softmax --moe-router-topk-scaling-factor 2.5
  --moe-router-dtype fp32
  --max-position-embeddings 163840
  --padded-vocab-size 129280
  --untie-embeddings-and-output-weights
)
