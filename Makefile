# `make check` is the lint gate, here and in continuous integration: ruff (lint and format),
# shellcheck, mypy on everything but the tests, and every stage's --help.
PYTHON ?= $(firstword $(wildcard $(VIRTUAL_ENV)/bin/python .venv/bin/python) python3)
SHELLCHECK ?= $(firstword $(wildcard $(dir $(PYTHON))shellcheck) shellcheck)
# Hidden folders (environments, caches) hold nothing of ours.
SHELL_FILES = $(shell find . -name '.?*' -prune -o -name '*.sh' -print) .ci/run
STAGES = $(wildcard *.py)

.PHONY: check lint format types help test

check: lint types help

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(SHELLCHECK) --external-sources $(SHELL_FILES)

format:
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

types:
	$(PYTHON) -m mypy

help:
	@set -e; for stage in $(STAGES); do \
		echo "$(PYTHON) $$stage --help"; $(PYTHON) $$stage --help >/dev/null; \
	done

test:
	bash tests/run.sh
