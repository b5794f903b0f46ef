"""An output that the user may not write is refused by every stage, before the work."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import tools

OTHER_USER = 65534
# Root may write anywhere; without these two capabilities it is an ordinary user.
RIGHTS = "-dac_override,-dac_read_search"
DROPPED = ("setpriv", f"--bounding-set={RIGHTS}", f"--inh-caps={RIGHTS}") * (os.geteuid() == 0)

TRAINING = ("--finetune-data-files", "{work}/chat.jsonl", "--seq-length", "64")
CALIBRATION = ("--calib-dataset", "{work}/text.jsonl")
PROMPTS = ("--prompts-path", "{work}/chat.jsonl")
HF, MLM = ("--pretrained-model-path", "{work}/hf"), ("--load", "{work}/mlm")
STAGES = {
    "convert": (*HF, "--save", "{closed}/new"),
    "quantize": (*HF, *CALIBRATION, "--save", "{closed}/new/deep"),
    "prune": (*HF, *CALIBRATION, "--prune-target-params", "600k", "--save", "{closed}/new"),
    "eagle3": (*HF, *TRAINING, "--save", "{closed}/new"),
    "distill": (*MLM, "--teacher", "{work}/hf", *TRAINING, "--save", "{closed}/new"),
    "finetune": (*MLM, *TRAINING, "--save", "{closed}/new"),
    "extract_features": (*HF, *TRAINING, "--output-dir", "{closed}/new"),
    "generate": (*HF, *PROMPTS, "--output", "{closed}/new.jsonl"),
    "mmlu": (*HF, "--mmlu-dataset", "{work}/questions.jsonl", "--mmlu-output", "{closed}/n.json"),
    "export": (*MLM, "--export-dir", "{closed}/new"),
}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    work = tmp_path_factory.mktemp("unwritable")
    tools.random_model(work / "hf", "qwen3")
    tools.write_conversations(work / "chat.jsonl")
    tools.write_texts(work / "text.jsonl")
    question = {"question": "1 + 1?", "subject": "sums", "choices": list("1234"), "answer": 1}
    (work / "questions.jsonl").write_text(json.dumps(question) + "\n")
    tools.run("convert.py", "--pretrained-model-path", work / "hf", "--save", work / "mlm")
    (work / "closed").mkdir(mode=0o555)
    if os.geteuid() == 0:
        os.chown(work / "closed", OTHER_USER, -1)
    return work


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_refuses_an_output_that_it_may_not_write(work, stage):
    words = [word.format(work=work, closed=work / "closed") for word in STAGES[stage]]
    done = subprocess.run(
        [*DROPPED, sys.executable, str(tools.ROOT / f"{stage}.py"), *words, "--check"],
        env=tools.environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"may not write to {work / 'closed'}" in done.stderr
    assert "remedy: name another place" in done.stderr
