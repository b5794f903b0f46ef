#!/usr/bin/env bash
# Run by the image's build: create an environment on top of the base image's Python and packages.
#
#   VIRTUAL_ENV  folder of the environment
#   TORCH_INDEX  package index of torch, for a base without torch; empty for pip's own
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

# Python and pip, if the base has no pip.
if ! python3 -m pip --version >/dev/null 2>&1; then
  apt-get update
  DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
    python3 python3-pip ca-certificates
  rm -rf /var/lib/apt/lists/*
fi
python3 -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 12), (3, 13)))' || {
  printf 'error: %s\n  cause: %s\n  remedy: %s\n' "the base image's $(python3 --version)" \
    "Python 3.12 or 3.13 is needed" "choose another BASE_IMAGE" >&2
  exit 2
}
python3 -m venv --without-pip --system-site-packages "$VIRTUAL_ENV"
install=(python3 -m pip --python "$VIRTUAL_ENV/bin/python" install --disable-pip-version-check)
# The base's constraints are for its own environment, which is not changed.
unset PIP_CONSTRAINT

# base_packages: exact versions of what the base has, so that pip fails instead of replacing one.
base_packages() {
  "$VIRTUAL_ENV/bin/python" - <<'PYTHON'
from importlib import metadata

for name in ("torch", "triton", "transformer-engine", "numpy"):
    try:
        print(f"{name}=={metadata.version(name)}")
    except metadata.PackageNotFoundError:
        pass
PYTHON
}
base_packages >constraints.txt
if grep -q '^torch==' constraints.txt; then
  # The base decides these versions; post_training.doctor reports one that is not supported.
  kept=$(sed 's/==.*//' constraints.txt | paste -sd '|')
  grep -vE "^($kept)==" requirements.txt >added.txt
else
  torch=$(grep '^torch==' requirements.txt | cut -d ' ' -f 1)
  "${install[@]}" ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$torch"
  base_packages | grep '^torch==' >constraints.txt
  grep -v '^torch==' requirements.txt >added.txt
fi
"${install[@]}" --constraint constraints.txt --requirement added.txt
