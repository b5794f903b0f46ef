"""docs/extending.md, "A model family": doing what it says is enough."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import extending
import pytest
import speed
import tools

FAMILY = "post_training/models/families/arcee.py"
REGISTRY = "post_training/models/families/registry.py"
# The page's test files, and what of them one process can do: the rest are other layouts.
TESTS = {
    "tests/unit/test_families.py": "",
    "tests/parallel/test_logits.py": "::test_logits_equal_transformers_in_float32[TP=1]",
    "tests/stages/test_convert_export.py": "::test_round_trip_is_exact[TP=1]",
}


@pytest.fixture(scope="module")
def extended(tmp_path_factory) -> Path:
    """A copy of the repository after the section, which touches its file and its row alone."""
    root = extending.copy_of_repository(tmp_path_factory.mktemp("extended") / "repository")
    before = extending.contents(root)
    assert extending.follow(extending.section("A model family"), root) == ({FAMILY}, {REGISTRY})
    after = extending.contents(root)
    assert {name for name in after if after[name] != before.get(name)} == {FAMILY, REGISTRY}
    assert len(after[REGISTRY].splitlines()) == len(before[REGISTRY].splitlines()) + 1
    return root


def python(root: Path, *words: str) -> str:
    """Run a module of Python in the copy, which comes first on the path; it must succeed."""
    done = subprocess.run(
        [sys.executable, "-m", *words],
        cwd=root,
        env=tools.environment(PYTHONPATH=str(root)),
        capture_output=True,
        text=True,
        timeout=speed.scaled(900),
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


def test_the_example_passes_the_linters(extended):
    python(extended, "ruff", "check", "--no-cache", FAMILY, REGISTRY)
    python(extended, "ruff", "format", "--no-cache", "--check", FAMILY, REGISTRY)
    python(extended, "mypy", "--cache-dir=/dev/null", FAMILY)


def test_the_page_names_the_tests_that_ask_the_registry():
    commands = re.findall(r"```text\n(.*?)```", extending.section("A model family"), re.DOTALL)
    assert re.findall(r"tests/\w+/test_\w+\.py", "".join(commands)) == list(TESTS)


@pytest.mark.timeout(1000)
def test_the_family_passes_the_tests_of_every_family(extended):
    before = extending.contents(extended)
    chosen = [file + test for file, test in TESTS.items()]
    said = python(extended, "pytest", "-v", "-n", "0", "-p", "no:cacheprovider", *chosen)
    for file, test in TESTS.items():
        name = re.escape(file + test) if test else rf"{file}::\S+\[arcee\]"
        assert re.search(rf"^{name} PASSED", said, re.MULTILINE), said[-6000:]
    assert extending.contents(extended) == before
