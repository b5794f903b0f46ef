# shellcheck shell=bash
# A set-up file for SANDBOX_ENV_SETUP: copy it, uncomment what you need, and name the copy:
#
#   SANDBOX_ENV_SETUP=slurm/my_setup.sh bash slurm/sbatch.sh --nodes=1 quantize.sh <conf>
#
# It is read before everything else and needs no `export`. docs/variables.md lists the variables.
# What it sets wins over the environment of the command.

# Models and outputs, as the nodes see them.
#HF_MODEL_CKPT=/scratch/models/Qwen3-8B
#MLM_MODEL_CKPT=/scratch/work/Qwen3-8B_mlm
#MLM_WORK_DIR=/scratch/work

# Parallel sizes: TP x PP x CP x DP processes, or EP x ETP x PP x DP where the experts need more.
#TP=8
#PP=1
#EP=1
#ETP=1

# The job.
#USER_FSW=/scratch/me
#CONTAINER_IMAGE=/scratch/post-training.sif
#LAUNCH_SCRIPT=python

# Flags for every stage.
#MLM_EXTRA_ARGS="--distributed-timeout-minutes 30"
