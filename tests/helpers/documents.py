"""The public documents as the tests read them: their commands, section by section.

Blocks marked ``bash`` run as they stand. Those before a document's first ``##`` heading set it up
and run before each of its sections. Blocks marked ``sh`` need a hub or several machines: only the
checks before the launch run. Blocks marked ``text`` are not run.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import speed
import tools

RUN = ("README.md", "docs/stages.md", "speculative.md")  # those with ``bash`` blocks
NAMES = sorted(
    str(path.relative_to(tools.ROOT))
    for pattern in ("*.md", "docs/*.md", "slurm/*.md", "benchmarks/*.md")
    for path in tools.ROOT.glob(pattern)
)


def read(name: str) -> str:
    return (tools.ROOT / name).read_text(encoding="utf-8")


def blocks(language: str, text: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def sections(name: str) -> dict[str, str]:
    """Heading -> the section's ``bash`` commands, set-up included; only sections that have some."""
    first, *parts = re.split(r"^#{2,} +(.*)\n", read(name), flags=re.MULTILINE)
    setup = "".join(blocks("bash", first))
    found = {}
    for heading, text in zip(parts[::2], parts[1::2], strict=True):
        commands = "".join(blocks("bash", text))
        if commands:
            found[heading] = setup + commands
    return found


def commands(text: str, *languages: str) -> list[str]:
    """The lines that start a launcher, continuation lines joined."""
    joined = "\n".join(block for language in languages for block in blocks(language, text))
    return [
        re.sub(r" +", " ", line).strip()
        for line in re.sub(r"\\\n", " ", joined).splitlines()
        if re.search(r"\bbash \S+\.sh\b", line)
    ]


def environment(temporary: Path) -> dict[str, str]:
    """A user's shell with the environment active, and ``temporary`` as its temporary folder."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    inherited = {
        name: value
        for name, value in tools.environment().items()
        if not name.startswith("MLM_") and name != "PYTHONPATH"
    }
    return {**inherited, "PATH": path, "PYTHON": sys.executable, "TMPDIR": str(temporary)}


def shell(
    line: str, temporary: Path, limit: float = 1500, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run commands in one shell at the repository's top, within ``limit`` seconds."""
    return subprocess.run(
        ["bash", "-c", f"set -euo pipefail\n{line}"],
        cwd=tools.ROOT,
        env={**environment(temporary), **variables},
        capture_output=True,
        text=True,
        timeout=speed.scaled(limit),
    )
