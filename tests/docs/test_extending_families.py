"""docs/extending.md, "A model family": what the page says is done in a copy of the tree, and works.

Only the file and the row that the page names are written; the family's tests then run in the copy.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tools

PAGE = (tools.ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
SECTION = re.search(r"^## A model family\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)[1]
TEST_FILES = re.findall(
    r"tests/\w+/test_\w+\.py", re.search(r"```bash\n(.*?)```", SECTION, re.S)[1]
)
NAME = "arcee"
# Of the page's test files: what concerns one process. The others differ in the layout alone.
TESTS = {
    "tests/unit/test_families.py": "",
    "tests/parallel/test_logits.py": "::test_logits_equal_transformers_in_float32[TP=1]",
    "tests/stages/test_convert_export.py": "::test_round_trip_is_exact[TP=1]",
}


def written_by_the_page() -> dict[str, str]:
    """Path -> code block, for each sentence that names a path and ends with a colon."""
    return dict(re.findall(r"`(post_training/[\w/]+\.py)`:\n\n```python\n(.*?)```", SECTION, re.S))


def git(folder: Path, *words: str) -> str:
    return subprocess.run(
        ["git", *words], cwd=folder, capture_output=True, text=True, check=True
    ).stdout


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The tree as it is, under git, with the page's file and row written."""
    folder = tmp_path_factory.mktemp("extended") / "tree"
    for name in git(tools.ROOT, "ls-files", "-co", "--exclude-standard").splitlines():
        if (tools.ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(tools.ROOT / name, folder / name)
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    for path, block in written_by_the_page().items():
        target = folder / path
        if target.exists():
            text = target.read_text(encoding="utf-8")
            assert text.count("_FILES = (\n") == 1
            block = text.replace("_FILES = (\n", f"_FILES = (\n{block}")
        target.write_text(block, encoding="utf-8")
    return folder


def run(copy: Path, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, *words],
        cwd=copy,
        env=tools.environment(PYTHONPATH=str(copy), PYTHONDONTWRITEBYTECODE="1"),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


def test_the_page_names_one_new_file_and_one_row():
    written = written_by_the_page()
    assert list(written) == [
        f"post_training/models/families/{NAME}.py",
        "post_training/models/families/registry.py",
    ]
    assert not (tools.ROOT / f"post_training/models/families/{NAME}.py").exists()
    assert len(written["post_training/models/families/registry.py"].splitlines()) == 1
    assert set(TEST_FILES) == set(TESTS)


def test_the_new_family_is_clean_for_ruff_and_mypy(copy):
    path = f"post_training/models/families/{NAME}.py"
    for words in (("ruff", "check", path), ("ruff", "format", "--check", path), ("mypy", path)):
        run(copy, "-m", *words)


@pytest.mark.timeout(1000)
@pytest.mark.parametrize("file", TESTS)
def test_the_familys_tests_pass_in_the_copy(copy, file):
    if file == "tests/unit/test_families.py":
        assert f"[{NAME}]" in run(copy, "-m", "pytest", "--co", "-q", "-n", "0", file)
    run(copy, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", file + TESTS[file])
    changed = git(copy, "status", "--porcelain").splitlines()
    assert sorted(line.split()[-1] for line in changed if line[1] != " ") == sorted(
        written_by_the_page()
    )
