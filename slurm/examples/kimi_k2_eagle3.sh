# shellcheck shell=bash
# Train an EAGLE-3 draft for Kimi-K2 on 64 GPUs: 8 nodes of 8.
#
#   SANDBOX_ENV_SETUP=slurm/examples/kimi_k2_eagle3.sh \
#     bash slurm/sbatch.sh --nodes=8 eagle3.sh moonshotai/Kimi-K2-Instruct
export HF_MODEL_CKPT=/workspace/scratch/moonshotai/Kimi-K2-Instruct
export TP=8 ETP=1 EP=64
