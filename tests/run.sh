#!/usr/bin/env bash
# Set up the environment, then run the whole test suite, or the tests named.
#
#   bash tests/run.sh [pytest arguments]
#   bash tests/run.sh tests/unit/test_arguments.py -k conf
#
#   TEST_WORKERS  test files that run at the same time (default: 2)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=conf/environment.sh
source conf/environment.sh
setup_development_environment

# Tests start several processes at a time: one thread each.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false
# Hundreds of processes import the same modules: the first compiles them for all.
unset PYTHONDONTWRITEBYTECODE
# In the order of the folders, whose last, tests/unit, has the short ones: no worker ends alone.
exec "$PYTHON" -m pytest -n "${TEST_WORKERS:-2}" --dist loadfile --no-loadscope-reorder "$@"
