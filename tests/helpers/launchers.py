"""Run the launchers and see what they would start.

``LAUNCH_SCRIPT`` replaces what starts the stage. Here it is ``printf``, which shows the command
line word by word, after the real stage has checked it.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import speed
from confs import ROOT

from post_training.cli.stage import make_plan

SHOW = "printf %s\\n"
INTERFACE = """
    HF_MODEL_CKPT TOKENIZER_MODEL MLM_MODEL_CKPT MLM_MODEL_LOAD MLM_MODEL_SAVE EXPORT_DIR
    MLM_EXTRA_ARGS DATASET DRAFT_LEN BLEND_PATH
    MLM_PROMPTS MLM_REF_LABEL MLM_MODEL_CFG MLM_SKIP_INSTALL MLM_ENV_SETUP SANDBOX_ENV_SETUP
    SANDBOX_ROOT LAUNCH_SCRIPT MLM_LAUNCH TEACHER_CKPT PROMPTS_PATH OUTPUT_PATH OSL STEPS
    SERVER SERVER_MODEL TP PP CP EP ETP DP WORLD_SIZE RANK LOCAL_RANK
""".split()


def environment(tmp_path: Path) -> dict[str, str]:
    """A user's environment: nothing of the interface set, this Python, a work folder."""
    kept = {name: value for name, value in os.environ.items() if name not in INTERFACE}
    return {**kept, "PYTHON": sys.executable, "MLM_WORK_DIR": str(tmp_path / "work")}


def bash(*words: object, cwd: Path = ROOT, code: int = 0, **environment: str):
    done = subprocess.run(
        ["bash", *map(str, words)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=speed.scaled(120),
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def started(script: str, *words: object, cwd: Path = ROOT, **environment: str) -> list[str]:
    """The words that the launcher starts, the stage's path first."""
    environment = {"LAUNCH_SCRIPT": SHOW, **environment}
    return bash(ROOT / script, *words, cwd=cwd, **environment).stdout.splitlines()


def option(words: list[str], name: str) -> str:
    """The value of the last ``name``: the one that counts."""
    return words[len(words) - 1 - words[::-1].index(name) + 1]


def planned(script: str, *words: object, cwd: Path = ROOT, **environment: str) -> Any:
    """The plan of a launcher's command line as ``--dry-run`` makes it, its stage not started."""
    done = bash(ROOT / script, *words, cwd=cwd, **{**environment, "MLM_LAUNCH": "words"})
    stage, *flags = done.stdout.split("\0")[:-1]
    declared = importlib.import_module(stage.removesuffix(".py")).STAGE
    return make_plan(declared, [*flags, "--dry-run"])
