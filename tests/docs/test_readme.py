"""README.md and speculative.md are true: their commands run as they stand, the table is the code's.

Blocks marked ``bash`` are run in order, in one shell, in a temporary folder's name space (TMPDIR).
Blocks marked ``sh`` need a hub, several GPUs or this very suite: their launchers' checks are run.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tools

README = (tools.ROOT / "README.md").read_text(encoding="utf-8")
SPECULATIVE = (tools.ROOT / "speculative.md").read_text(encoding="utf-8")


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def shell_environment(temporary: Path) -> dict[str, str]:
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    inherited = {
        name: value
        for name, value in tools.environment().items()
        if not name.startswith("MLM_") and name != "PYTHONPATH"
    }
    return {**inherited, "PATH": path, "PYTHON": sys.executable, "TMPDIR": str(temporary)}


def run_blocks(text: str, temporary: Path) -> subprocess.CompletedProcess[str]:
    """Run a document's ``bash`` blocks in one shell; the end of the output is in the failure."""
    done = subprocess.run(
        ["bash", "-c", "set -euo pipefail\n" + "\n".join(blocks("bash", text))],
        cwd=tools.ROOT,
        env={**shell_environment(temporary), "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> tuple[Path, str]:
    """The README's commands, run: the folder they worked in, and what they printed."""
    temporary = tmp_path_factory.mktemp("readme")
    output = run_blocks(README, temporary).stdout
    return temporary, output


@pytest.mark.timeout(1600)
def test_every_command_of_the_readme_runs_as_it_stands(ran):
    temporary, output = ran
    assert output.count("The main job, from trained to ready") == 2
    assert "ready: every stage can run" in output
    assert "The capital of Arvon is" in output
    work = temporary / "megatron_workspace" / "quickstart"
    assert (work / "tiny_nvfp4_hf" / "hf_quant_config.json").is_file()
    found = json.loads((work / "validate.json").read_text())["acceptance"]
    assert found["acceptance_length"] >= 2.0
    assert found["identical_answers"] == found["answers"] >= 60
    scores = {
        name: json.loads((work / f"mmlu_{name}.json").read_text())["accuracy"]
        for name in ("bf16", "fp8", "pruned", "distilled")
    }
    assert scores["bf16"] >= 0.8 and scores["fp8"] >= scores["bf16"] - 0.05
    # Distillation wins back at least half of what pruning lost.
    assert scores["distilled"] >= (scores["bf16"] + scores["pruned"]) / 2
    assert scores["pruned"] < scores["bf16"] - 0.1


@pytest.mark.timeout(300)
def test_a_second_quickstart_reuses_everything(ran):
    again = subprocess.run(
        ["bash", "quickstart.sh", "--all"],
        cwd=tools.ROOT,
        env=shell_environment(ran[0]),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert again.returncode == 0, again.stderr[-3000:]
    assert again.stderr.count("still valid and is reused") == 12


@pytest.mark.timeout(1600)
def test_every_command_of_speculative_md_runs_as_it_stands(ran):
    run_blocks(SPECULATIVE, ran[0])
    work = ran[0] / "megatron_workspace" / "quickstart"
    assert (work / "quant_joined" / "run.json").is_file()


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
    from post_training.quantization import formats

    shown = re.search(r"<!-- formats: .*?-->\n(.*?)\n<!-- end of formats -->", README, re.DOTALL)
    assert shown is not None
    assert shown[1].strip() == formats.markdown_table().strip()


def test_every_named_file_is_there():
    for name in re.findall(r"`((?:tests|post_training|quickstart|benchmarks)/[\w/.-]+)`", README):
        assert (tools.ROOT / name).exists(), name
