# shellcheck shell=bash
# The Python environment of the stages. Sourcing this file only defines functions.
#
#     source conf/environment.sh
#     setup_environment               # what the stages need: quickstart.sh
#     setup_development_environment   # also what tests and checks need: tests/run.sh, .ci/run
#     "$PYTHON" ...
#
# Both set and export PYTHON: the interpreter of an environment that already has the packages
# (PYTHON, an active one, a container's), else of .venv in the repository, created and filled if
# needed. The second time they only compare a stamp.
#
#     MLM_SKIP_INSTALL=1   never install; use .venv if it exists
#     MLM_VENV             folder of the environment (default: .venv beside this folder)

setup_environment() {
  choose_environment requirements.txt
}

setup_development_environment() {
  choose_environment requirements.txt requirements-dev.txt
}

# choose_environment FILES...: set PYTHON. The functions below see root, venv and files.
choose_environment() {
  local root venv files=("$@") candidate
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  venv=${MLM_VENV:-$root/.venv}
  # The stamp tells without starting Python whether .venv matches the requirements.
  if [[ -z "${PYTHON:-}${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]] && environment_is_current; then
    export PYTHON=$venv/bin/python
    return
  fi
  for candidate in "${PYTHON:-}" "${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}" \
    "${CONDA_PREFIX:+$CONDA_PREFIX/bin/python}" "$(type -P python3 || true)"; do
    if [[ -n "$candidate" ]] && environment_fits "$candidate"; then
      export PYTHON=$candidate
      return
    fi
  done
  if [[ -n "${MLM_SKIP_INSTALL:-}" ]]; then
    export PYTHON=${PYTHON:-$venv/bin/python}
    [[ -x "$PYTHON" ]] || environment_error "MLM_SKIP_INSTALL=$MLM_SKIP_INSTALL" \
      "no environment has the packages, and there is no $PYTHON" "unset MLM_SKIP_INSTALL"
    return
  fi
  environment_is_current || install_environment
  export PYTHON=$venv/bin/python
}

# environment_fits PYTHON: whether it has the packages that the files name, in supported versions.
environment_fits() {
  local modules=() tool program
  if [[ " ${files[*]} " == *requirements-dev.txt* ]]; then
    modules=(pytest xdist pytest_timeout mypy ruff)
    tool=$(dirname "$1")/shellcheck
    [[ -x "$tool" ]] || type -P shellcheck >/dev/null || return 1
  fi
  program='import importlib.util, sys
from post_training.common import versions
missing = [m for m in sys.argv[1:] if importlib.util.find_spec(m) is None]
sys.exit(bool(missing or versions.problems()))'
  (cd "$root" && "$1" -c "$program" "${modules[@]}") 2>/dev/null
}

# environment_is_current: whether .venv was filled from the files as they are now.
environment_is_current() {
  local file
  [[ -x "$venv/bin/python" ]] || return 1
  for file in "${files[@]}"; do
    [[ "$(cat "$venv/.stamp-$file" 2>/dev/null)" == "$(requirements_hash "$file")" ]] || return 1
  done
}

requirements_hash() {
  sha256sum <"$root/$1"
}

# install_environment: create .venv with Python 3.12 or 3.13 and install the files into it.
install_environment() {
  local file
  if ! python_fits "$venv/bin/python"; then
    make_venv
  fi
  for file in "${files[@]}"; do
    [[ "$(cat "$venv/.stamp-$file" 2>/dev/null)" != "$(requirements_hash "$file")" ]] || continue
    echo "installing $file into $venv (the first time downloads about 4 GB)" >&2
    "$venv/bin/python" -m pip install --disable-pip-version-check -r "$root/$file" >&2 ||
      environment_error "pip install -r $file" "pip failed, see above" \
        "fix the network or the disk, then run the same command again"
    requirements_hash "$file" >"$venv/.stamp-$file"
  done
}

make_venv() {
  local python
  if python=$(find_python); then
    echo "creating $venv with $("$python" --version)" >&2
    "$python" -m venv --clear "$venv" >&2 || environment_error "$python -m venv $venv" \
      "this Python cannot create environments" "apt-get install python3-venv, or install uv"
  elif type -P uv >/dev/null; then
    uv venv --seed --clear --python 3.12 "$venv" >&2 || environment_error "uv venv $venv" \
      "uv could not get Python 3.12" "install Python 3.12"
  else
    environment_error "Python 3.12 (not found)" \
      "looked for python3.12, python3.13, python3, pyenv's versions and uv" \
      "install one of them, e.g. apt-get install python3.12-venv, pyenv install 3.12, or uv"
  fi
}

# find_python: print a Python 3.12 or 3.13. A shim that does not run is skipped.
find_python() {
  local candidate pyenv=${PYENV_ROOT:-${HOME:-/root}/.pyenv}
  for candidate in python3.12 python3.13 python3 \
    "$pyenv"/versions/3.12*/bin/python "$pyenv"/versions/3.13*/bin/python; do
    if candidate=$(type -P "$candidate") && python_fits "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  return 1
}

python_fits() {
  [[ -x "$1" ]] &&
    "$1" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 12), (3, 13)))' 2>/dev/null
}

environment_error() {
  printf 'error: %s\n  cause: %s\n  remedy: %s\n' "$1" "$2" "$3" >&2
  exit 2
}
