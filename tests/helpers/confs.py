"""The confs of the repository, and their flags as a stage parses them."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from post_training.cli.stage import Stage, run
from post_training.config import arguments, model_description
from post_training.config.options import StageOptions
from post_training.config.parser import make_parser
from post_training.models.architecture import Architecture

ROOT = Path(__file__).resolve().parents[2]
CONFS = sorted(
    str(path.relative_to(ROOT / "conf").with_suffix("")) for path in ROOT.glob("conf/*/*.sh")
)


def parse(*words: str) -> StageOptions:
    """The options of a command line; UsageError for a mistake in it."""
    return arguments.parse("convert", StageOptions, list(words))


def conf_architecture(conf: str) -> Architecture:
    """The architecture that a conf states."""
    return model_description.architecture(parse(*conf_flags(conf)))


def values(*words: str) -> dict[str, Any]:
    """The values of all flags, given or not, by name."""
    defaults, given = make_parser("convert", StageOptions, show_all=False).split(words)
    return {**defaults, **given}


def run_checks(*words: str, check=lambda options: None) -> None:
    """Run a stage that has no flags of its own and a ``check``, as its ``main`` does."""

    def checked(options: StageOptions) -> SimpleNamespace:
        check(options)
        return SimpleNamespace(options=options, source=None)

    run(Stage("convert", StageOptions, checked, lambda plan, session: None), words)


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
