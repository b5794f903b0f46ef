# shellcheck shell=bash
# Export Kimi-K2 with its draft from 16 pipeline stages on 2 nodes; 61 layers are 3 + 14 x 4 + 2.
#
#   SANDBOX_ENV_SETUP=slurm/examples/kimi_k2_export.sh MLM_MODEL_CKPT=/workspace/scratch/Kimi-K2-Eagle3 \
#     bash slurm/sbatch.sh --nodes=2 export.sh moonshotai/Kimi-K2-Instruct
export HF_MODEL_CKPT=/workspace/scratch/moonshotai/Kimi-K2-Instruct
export PP=16
export MLM_EXTRA_ARGS="--decoder-first-pipeline-num-layers 3 --decoder-last-pipeline-num-layers 2
  --init-model-with-meta-device --use-cpu-initialization"
