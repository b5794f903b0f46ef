"""Do what docs/extending.md says, in a copy of the repository.

A fenced ``python`` or ``shell`` block that starts with ``# path`` is a new file. A ``diff`` block
adds lines to files that exist: each run of ``+`` lines goes after the line of context above it,
which must be there once.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import tools

PAGE = tools.ROOT / "docs" / "extending.md"
_ENDINGS = {"python": r"\.py", "shell": r"\.sh"}
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def copy_of_repository(target: Path) -> Path:
    """The files that git knows, or would add, as they are now."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=tools.ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        source = tools.ROOT / name
        if source.is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name)
    return target


def contents(root: Path) -> dict[str, bytes]:
    """Every file of a copy, by its path; what Python compiles is left out."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def section(title: str) -> str:
    """The text of one ``##`` section of the page."""
    page = PAGE.read_text(encoding="utf-8")
    [found] = re.findall(
        rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", page, re.DOTALL | re.MULTILINE
    )
    return found


def follow(text: str, root: Path) -> tuple[set[str], set[str]]:
    """Write the files and rows of a section into ``root``. Returns new and changed paths."""
    created, changed = set(), set()
    for language, block in _BLOCK.findall(text):
        first, _, rest = block.partition("\n")
        if language == "diff":
            changed.add(_add_rows(block.splitlines(), root))
        elif language in _ENDINGS and re.fullmatch(rf"# \S+{_ENDINGS[language]}", first):
            path = root / first.removeprefix("# ")
            assert not path.exists(), f"{path} exists already"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(rest, encoding="utf-8")
            created.add(first.removeprefix("# "))
    return created, changed


def _add_rows(lines: list[str], root: Path) -> str:
    old, new, *hunk = lines
    name = new.removeprefix("+++ b/")
    assert old == f"--- a/{name}"
    path = root / name
    text = path.read_text(encoding="utf-8").splitlines()
    position = 0
    for line in hunk:
        if line.startswith("+"):
            text.insert(position, line[1:])
        else:
            assert text.count(line[1:]) == 1, f"{name} has not exactly one line {line[1:]!r}"
            position = text.index(line[1:])
        position += 1
    path.write_text("\n".join(text) + "\n", encoding="utf-8")
    return name
