"""speculative.md names only what is there: stages, flags, files."""

from __future__ import annotations

import re

import pytest
import tools

TEXT = (tools.ROOT / "speculative.md").read_text(encoding="utf-8")
BLOCKS = "\n".join(re.findall(r"^```bash\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE))
COMMANDS = re.findall(r"bash (\w+)\.sh ((?:[^\n]|\\\n)*)", BLOCKS.replace("\\\n", " "))


def test_every_stage_of_the_road_is_shown():
    assert {stage for stage, _ in COMMANDS} == {
        "generate", "eagle3", "extract_features", "convert", "validate", "export",
    }  # fmt: skip


@pytest.mark.parametrize("stage", sorted({stage for stage, _ in COMMANDS}))
def test_its_flags_exist(stage):
    known = tools.run(f"{stage}.py", "--help-all").stdout
    assert (tools.ROOT / f"{stage}.sh").is_file()
    flags = {
        flag for name, words in COMMANDS if name == stage for flag in re.findall(r"--[\w-]+", words)
    }
    named = set(re.findall(rf"`{stage}\.sh ([^`]*)`", TEXT))
    flags |= {flag for words in named for flag in re.findall(r"--[\w-]+", words)}
    assert flags or stage == "validate"  # it is run by variables alone
    assert not {flag for flag in flags if not re.search(rf"{flag}\b", known)}


def test_its_variables_are_those_of_the_launchers():
    variables = set(re.findall(r"\b([A-Z][A-Z_]{2,})=", BLOCKS)) - {"MLM_WORK_DIR"}
    launchers = "".join(path.read_text() for path in tools.ROOT.glob("*.sh"))
    shared = (tools.ROOT / "conf" / "arguments.sh").read_text()
    assert variables
    assert not {name for name in variables if name not in launchers + shared}
