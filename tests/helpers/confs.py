"""The confs of the repository, and their flags as a stage parses them."""

from __future__ import annotations

import subprocess
from pathlib import Path

from post_training.config import arguments
from post_training.config.options import StageOptions

ROOT = Path(__file__).resolve().parents[2]
CONFS = sorted(
    str(path.relative_to(ROOT / "conf").with_suffix("")) for path in ROOT.glob("conf/*/*.sh")
)


def parse(*words: str) -> StageOptions:
    """The options of a command line; UsageError for a mistake in it."""
    return arguments.parse("convert", StageOptions, list(words))


def conf_flags(conf: str) -> list[str]:
    """The flags of a conf of ours, as bash sees them."""
    program = 'source "$1" && printf "%s\\0" "${MODEL_ARGS[@]}"'
    done = subprocess.run(
        ["bash", "-c", program, "bash", str(ROOT / "conf" / f"{conf}.sh")],
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.split("\0")[:-1]
