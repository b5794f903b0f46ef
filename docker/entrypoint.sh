#!/usr/bin/env bash
# What `docker run IMAGE ...` runs:
#
#   docker run IMAGE                                   this help
#   docker run IMAGE <stage>.sh <conf> [more]          a stage; <stage>.sh --help shows its flags
#   docker run IMAGE <command> [words]                 any other command, e.g. bash
#   docker run IMAGE doctor                            what this machine can run
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

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
