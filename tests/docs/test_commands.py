"""The documents' commands run as they stand, each section once, in one folder for all of them.

A test runs the sections that its own one needs first, so each can be run alone.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import documents
import pytest
import quickstart_model
from huggingface_hub import ModelCard

MAIN, ALL = ("README.md", "Quickstart"), ("README.md", "Prune, distill and draft too")
STAGES, SPECULATIVE = "docs/stages.md", "speculative.md"
# What a section continues from, beside the whole quickstart.
NEEDS = {
    (STAGES, "quantize"): [(STAGES, "convert")],
    (STAGES, "mmlu"): [(STAGES, "quantize")],
    (STAGES, "export"): [(STAGES, "quantize")],
    (STAGES, "distill"): [(STAGES, "prune")],
    (STAGES, "finetune"): [(STAGES, "quantize")],
    (SPECULATIVE, "2. Train"): [(SPECULATIVE, "1. Data")],
    (SPECULATIVE, "Offline: the model runs once"): [(SPECULATIVE, "1. Data")],
    (SPECULATIVE, "Quantized models"): [(SPECULATIVE, "2. Train")],
    (SPECULATIVE, "3. Validate"): [(SPECULATIVE, "2. Train")],
    (SPECULATIVE, "4. Export"): [(SPECULATIVE, "2. Train")],
}
# Sections that show a plan or a machine and need no model.
ALONE = {(STAGES, "Dry run"), (STAGES, "Check the machine")}
Key = tuple[str, str]
# A section takes two minutes at most on two idle cores, the quickstart four; a hang still ends.
pytestmark = pytest.mark.timeout(3600)


class Ran:
    """Runs sections on demand, each once; ``work`` is the quickstart's folder."""

    def __init__(self, temporary: Path) -> None:
        self.temporary = temporary
        self.work = temporary / "megatron_workspace" / "quickstart"
        self._output: dict[Key, str | None] = {}

    def section(self, document: str, title: str) -> str:
        """What the section's commands printed; the sections that it needs run first."""
        key = (document, title)
        for needed in self._needed(key):
            self.section(*needed)
        if key not in self._output:
            self._output[key] = None
            commands = documents.sections(document)[title]
            # The suite trains the quickstart's model once: here, if this comes first.
            shared = quickstart_model.shared_with(self.work / "tiny")
            with shared if key == MAIN else contextlib.nullcontext():
                done = documents.shell(commands, self.temporary)
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
            self._output[key] = done.stdout
        output = self._output[key]
        assert output is not None, f"section {title} of {document} failed before"
        return output

    @staticmethod
    def _needed(key: Key) -> list[Key]:
        if key in ALONE or key == MAIN:
            return []
        return [MAIN] if key == ALL else [ALL, *NEEDS.get(key, [])]


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> Ran:
    return Ran(tmp_path_factory.mktemp("documents"))


def score(work: Path, name: str) -> float:
    return json.loads((work / f"mmlu_{name}.json").read_text())["accuracy"]


def test_the_quickstart_keeps_the_score_through_quantization(ran):
    output = ran.section(*MAIN)
    assert output.count("The main job, from trained to ready") == 1
    assert "The capital of Arvon is" in output
    assert score(ran.work, "bf16") >= 0.8
    assert score(ran.work, "fp8") >= score(ran.work, "bf16") - 0.05
    card = ModelCard.load(ran.work / "tiny_export" / "README.md")
    assert [each.metric_value for each in card.data.eval_results] == [
        pytest.approx(score(ran.work, "fp8"), abs=1e-4)
    ]
    assert {"FP8", "quantized"} <= set(card.data.tags) and card.data.license is None
    assert "vllm serve tiny_export" in card.content
    assert f"report: {ran.work / 'report.html'}" in output


def test_the_quickstarts_rest_prunes_distills_and_drafts(ran):
    assert ran.section(*ALL).count("The main job, from trained to ready") == 1
    found = json.loads((ran.work / "validate.json").read_text())["acceptance"]
    assert found["acceptance_length"] >= 2.0
    assert found["identical_answers"] == found["answers"] >= 60
    before, pruned, distilled = (score(ran.work, n) for n in ("bf16", "pruned", "distilled"))
    assert pruned < before - 0.1
    # Distillation recovers at least half of what pruning lost.
    assert distilled >= (before + pruned) / 2


def test_a_second_quickstart_reuses_everything(ran):
    ran.section(*ALL)
    again = documents.shell("bash quickstart.sh --all", ran.temporary)
    assert again.returncode == 0, again.stderr[-3000:]
    assert again.stderr.count("still valid and is reused") == 12


def test_the_doctor_finds_that_every_stage_can_run(ran):
    assert "ready: every stage can run" in ran.section(STAGES, "Check the machine")


def test_the_export_is_nvfp4_and_answers(ran):
    assert "The capital of Arvon is" in ran.section(STAGES, "export")
    assert (ran.work / "tiny_nvfp4_hf" / "hf_quant_config.json").is_file()


def test_a_draft_goes_along_to_the_quantized_model(ran):
    ran.section(SPECULATIVE, "Quantized models")
    assert (ran.work / "quant_joined" / "run.json").is_file()


@pytest.mark.parametrize(
    ("document", "title"),
    [(name, title) for name in documents.RUN for title in documents.sections(name)],
)
def test_the_section_runs_as_it_stands(ran, document, title):
    ran.section(document, title)
