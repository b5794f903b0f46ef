"""README.md is true: its commands run as they stand, its table is the code's.

Blocks marked ``bash`` are run in order, in one shell, in a temporary folder's name space (TMPDIR).
Blocks marked ``sh`` need a hub, several GPUs or this very suite: their launchers' checks are run.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import tools

README = (tools.ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def shell_environment(temporary: Path) -> dict[str, str]:
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    inherited = {
        name: value
        for name, value in tools.environment().items()
        if not name.startswith("MLM_") and name != "PYTHONPATH"
    }
    return {**inherited, "PATH": path, "PYTHON": sys.executable, "TMPDIR": str(temporary)}


def test_every_command_runs_as_it_stands(tmp_path):
    script = "set -euo pipefail\n" + "\n".join(blocks("bash"))
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=tools.ROOT,
        env={**shell_environment(tmp_path), "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "The main job, from trained to ready" in done.stdout
    assert "ready: every stage can run" in done.stdout
    work = tmp_path / "megatron_workspace" / "quickstart"
    assert (work / "tiny_nvfp4_hf" / "hf_quant_config.json").is_file()
    assert "The capital of Arvon is" in done.stdout

    again = subprocess.run(
        ["bash", "quickstart.sh"],
        cwd=tools.ROOT,
        env=shell_environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert again.returncode == 0, again.stderr[-3000:]
    assert again.stderr.count("still valid and is reused") == 5


def test_commands_that_cannot_run_here_pass_their_checks(tmp_path):
    lines = [line for block in blocks("sh") for line in block.splitlines() if ".sh " in line]
    checked = 0
    for line in lines:
        if "MLM_MODEL_CKPT" in line or "tests/run.sh" in line:
            continue  # needs the checkpoint that the line before makes
        # `true` stands for the launched stage: only the checks before it run.
        done = subprocess.run(
            ["bash", "-c", f"LAUNCH_SCRIPT=true {line}"],
            cwd=tools.ROOT,
            env=shell_environment(tmp_path),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, (line, done.stderr)
        checked += 1
    assert checked


def test_the_formats_table_is_the_codes():
    from post_training import formats

    shown = re.search(r"<!-- formats: .*?-->\n(.*?)\n<!-- end of formats -->", README, re.DOTALL)
    assert shown is not None
    assert shown[1].strip() == formats.markdown_table().strip()


def test_every_named_file_is_there():
    for name in re.findall(r"`((?:tests|post_training|quickstart|benchmarks)/[\w/.-]+)`", README):
        assert (tools.ROOT / name).exists(), name
