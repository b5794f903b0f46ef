#!/usr/bin/env bash
# Megatron-LM's name of extract_features.sh, which takes the same words and variables.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/extract_features.sh" "$@"
