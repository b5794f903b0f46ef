#!/usr/bin/env bash
# Run a stage as a SLURM job: one torchrun per node, or one task per GPU (LAUNCH_SCRIPT=python).
#
#   bash slurm/sbatch.sh [sbatch options] <stage>.sh <conf> [more]     checks, then submits
#   sbatch [sbatch options] slurm/sbatch.sh <stage>.sh <conf> [more]   submits; the job checks
#
#   TP=16 bash slurm/sbatch.sh --nodes=2 quantize.sh Qwen/Qwen3-8B FP8_DEFAULT_CFG
#   sbatch --nodes=2 slurm/sbatch.sh "quantize.sh Qwen/Qwen3-8B FP8_DEFAULT_CFG"
#
# With --dry-run among the stage's words the first form shows model, layout and command lines, and
# submits nothing. Variables, containers and requeueing: slurm/README.md.
#SBATCH --job-name=post-training
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --no-requeue               # with MLM_REQUEUE=1 the job changes that
#SBATCH --nodes=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --gpus-per-node=8           # EDIT: GPUs of a node; delete the line where nodes have none
#SBATCH --time=04:00:00             # EDIT: the partition's limit, or less
#SBATCH --signal=B:USR1@300         # EDIT: seconds that saving takes, plus a margin
##SBATCH --account=ACCOUNT          # EDIT: remove one # if the site needs it
##SBATCH --partition=PARTITION      # EDIT: remove one # if the site needs it
set -euo pipefail

# A job runs SLURM's copy of this file, so the repository's folder is looked up.
find_root() {
  local candidate command=
  [[ -z "${SLURM_JOB_ID:-}" ]] || command=$(scontrol show job "$SLURM_JOB_ID" |
    sed -n 's#^ *Command=\(.*\)/slurm/sbatch\.sh.*#\1#p')
  for candidate in "$(dirname "${BASH_SOURCE[0]}")/.." "${POST_TRAINING_ROOT:-}" "${SANDBOX_DIR:-}" \
    "$command" "${SLURM_SUBMIT_DIR:-}" "${SLURM_SUBMIT_DIR:-}/.."; do
    if [[ -n "$candidate" && -f "$candidate/slurm/job.sh" ]]; then
      (cd "$candidate" && pwd)
      return
    fi
  done
  printf 'error: %s\n  cause: %s\n  remedy: %s\n' "slurm/job.sh (not found)" \
    "the job was submitted from ${SLURM_SUBMIT_DIR:-$PWD}" \
    "submit from the repository's folder, or set POST_TRAINING_ROOT to it" >&2
  exit 2
}

SCRIPT_DIR=$(find_root)
# shellcheck source=conf/arguments.sh
source "$SCRIPT_DIR/conf/arguments.sh"
# shellcheck source=slurm/job.sh
source "$SCRIPT_DIR/slurm/job.sh"

if in_batch_script; then
  run_job "$@"
else
  submit_job "$@"
fi
