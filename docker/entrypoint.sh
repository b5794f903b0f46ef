#!/usr/bin/env bash
# What `docker run IMAGE ...` runs:
#
#   docker run IMAGE                                   this help
#   docker run IMAGE <stage>.sh <conf> [more]          a stage; <stage>.sh --help shows its flags
#   docker run IMAGE <command> [words]                 any other command, e.g. bash
#   docker run IMAGE doctor                            what this machine can run
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Not ENV in the Dockerfile: with pyxis an image's variables override those of the job.
export MLM_WORK_DIR=${MLM_WORK_DIR:-/workspace/scratch/megatron_workspace}
# With docker's --user there is neither a name nor a home; torch and huggingface_hub need both.
USER=${USER:-$(id -un 2>/dev/null || id -u)}
if [[ ! -w "${HOME:-/}" ]]; then
  HOME=/tmp/home-$(id -u)
  mkdir -p "$HOME"
fi
export USER HOME

if (($# == 0)); then
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
  echo "stages: $(find . -maxdepth 1 -name '*.sh' -printf '%f\n' | sort | paste -sd ' ')"
elif [[ "$1" == doctor ]]; then
  exec python -m post_training.doctor
elif [[ "$1" == *.sh && -f "$1" ]]; then
  exec bash "$@"
else
  exec "$@"
fi
