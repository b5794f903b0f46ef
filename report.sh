#!/usr/bin/env bash
# What stages recorded in a work folder, as one HTML page and as Markdown.
#
#   bash report.sh                                    # of MLM_WORK_DIR
#   bash report.sh /work/qwen3 --output /tmp/qwen3.html
#
# It starts no process of a stage and needs no GPU. All flags: bash report.sh --help
set -euo pipefail
SCRIPT_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=conf/arguments.sh
source "$SCRIPT_DIR/conf/arguments.sh"

read_set_up
choose_python
# Not from the current folder, which paths in the arguments are of.
PYTHONPATH=$SCRIPT_DIR exec "$PYTHON" -P -m post_training.report "$@"
