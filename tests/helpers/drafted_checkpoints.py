"""What test_validate.py and test_draft_export.py look at: made once, by three sets of processes."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tools
import torch

MODELS = ("qwen3", "llama3")
LAYOUTS = {
    "TP=1": (1, ()),
    "TP=2": (2, ("--tensor-model-parallel-size", 2)),
    "PP=2": (2, ("--pipeline-model-parallel-size", 2)),
}
# Which model is decoded at which layout: the tied one on a pipeline, where the last stage needs an
# embedding of its own; the one with d2t and a head of the draft's own under tensor parallelism.
DECODED = (("qwen3", "TP=1"), ("llama3", "TP=1"), ("llama3", "TP=2"), ("qwen3", "PP=2"))
EXPORTED = (("qwen3", "TP=1"), ("llama3", "TP=1"), ("qwen3", "PP=2"), ("llama3", "PP=2"))
QUESTIONS = (
    {"question_id": 81, "category": "writing", "turns": ["Compose a text.", "Shorten it."]},
    {"question_id": 82, "category": "math", "turns": ["What is 3 + 4?"]},
    {"question_id": 83, "category": "math", "turns": ["And 5?"]},
)
TOO_LONG = {"question_id": 85, "category": "math", "turns": ["long " * 60]}


@dataclass
class Drafted:
    """The folder with everything, and where things are in it."""

    work: Path

    def checkpoint(self, model: str) -> Path:
        """The checkpoint whose draft has random weights and a filled ``d2t``."""
        return self.work / f"{model} drafted"

    def exported(self, model: str, layout: str) -> Path:
        """The draft's folder."""
        return self.work / f"{model} draft {layout}"

    @functools.cache  # noqa: B019  # one object for the whole session
    def _decoded(self, model: str, layout: str) -> dict[str, Any]:
        return torch.load(self.work / f"{model} {layout}.pt", weights_only=True)

    def decoded(self, model: str, layout: str) -> dict[str, Any]:
        """What the job ``decode`` found."""
        return self._decoded(model, layout)

    def __hash__(self) -> int:
        return hash(self.work)


def make(work: Path) -> None:
    """Make everything in ``work``, an empty folder."""
    drafted = Drafted(work)
    lines = "".join(json.dumps(row) + "\n" for row in (*QUESTIONS, TOO_LONG))
    (work / "prompts.jsonl").write_text(lines)
    for model in MODELS:
        tools.random_model(work / f"{model} hf", model)
    (work / "text.jsonl").write_text(json.dumps({"text": "to calibrate with " * 20}) + "\n")
    (work / "four.json").write_text('{"draft_vocab_size": 4}')
    (work / "late.json").write_text('{"eagle_aux_hidden_state_layer_ids": [1, 3, 5]}')
    (work / "deep.json").write_text('{"num_hidden_layers": 2}')
    for layout, (processes, sizes) in LAYOUTS.items():
        jobs = []
        if layout == "TP=1":
            jobs = [*_checkpoints(work), *_fp8(work)]
        for model in MODELS:
            load = ("--load", drafted.checkpoint(model), "--fp32", *sizes)
            if (model, layout) in DECODED:
                jobs.append(("decode", (*load, "--output", work / f"{model} {layout}.pt")))
            if (model, layout) in EXPORTED:
                folder = ("--export-dir", drafted.exported(model, layout))
                jobs.append(("export", (*load, *folder, "--export-extra-modules")))
                jobs.append(("export", (*load, "--export-dir", work / f"{model} base {layout}")))
        jobs += _validations(work, drafted.checkpoint("qwen3"), layout, sizes)
        tools.run_stages(*jobs, processes=processes)


def _checkpoints(work: Path) -> list[tuple[str, tuple[object, ...]]]:
    source = ("--pretrained-model-path", work / "qwen3 hf", "--fp32")
    llama = ("--pretrained-model-path", work / "llama3 hf", "--fp32")
    eagle3 = ("--algorithm", "eagle3")
    four = ("--eagle-config", work / "four.json")
    deep = ("--eagle-config", work / "deep.json")
    late = ("--eagle-config", work / "late.json")
    whole = work / "llama3 bf16"  # a draft without a head of its own, nor a tied one
    return [
        ("convert", (*llama[:2], *eagle3, "--save", whole)),
        ("export", ("--load", whole, "--export-dir", f"{whole} draft", "--export-extra-modules")),
        ("convert", (*source, "--save", work / "qwen3 plain")),
        ("convert", (*source, *eagle3, "--save", work / "qwen3 untrained")),
        ("convert", (*source, *eagle3, *late, "--save", work / "qwen3 late")),
        ("convert", (*source, *eagle3, *deep, "--save", work / "qwen3 deep")),
        ("convert", (*llama, *eagle3, *four, "--save", work / "llama3 untrained")),
        (
            "convert",
            (*source, *eagle3, "--export-offline-model", "--save", work / "qwen3 offline"),
        ),
        (
            "export",
            (
                *("--load", work / "qwen3 offline", "--fp32", "--export-offline-model"),
                *("--export-dir", work / "qwen3 offline draft"),
            ),
        ),
        *(
            (
                "prepare",
                (
                    *("--load", work / f"{model} untrained", "--fp32"),
                    *("--save", work / f"{model} drafted"),
                ),
            )
            for model in MODELS
        ),
    ]


def _fp8(work: Path) -> list[tuple[str, tuple[object, ...]]]:
    """Quantize, attach a draft to the quantized model, decode with it, export both."""
    calibration = (
        *("--calib-dataset-path-or-name", work / "text.jsonl", "--calib-size", 2),
        *("--calib-max-sequence-length", 64, "--skip-generate"),
    )
    quantized, fp8 = work / "fp8", work / "fp8 drafted"
    load = ("--load", fp8, "--fp32")
    prompts = ("--prompts-path", work / "prompts.jsonl")
    measured = (
        *("--steps", 2, "--osl", 6, "--validate-output", work / "fp8.json"),
        *("--save-ground-truth-path", work / "fp8 truth.json"),
    )
    generated = ("--max-new-tokens", 6, "--output", work / "fp8 answers.jsonl")
    return [
        (
            "quantize",
            (
                *("--load", work / "qwen3 plain", "--save", quantized, "--fp32"),
                *("--export-quant-cfg", "FP8_DEFAULT_CFG", *calibration),
            ),
        ),
        ("convert", ("--load", quantized, "--save", fp8, "--fp32", "--algorithm", "eagle3")),
        ("validate", (*load, *prompts, *measured)),
        ("generate", (*load, *prompts, *generated)),
        ("export", (*load, "--export-dir", work / "fp8 base")),  # and its draft
        ("export", (*load, "--export-dir", work / "fp8 draft", "--export-extra-modules")),
    ]


def _validations(
    work: Path, checkpoint: Path, layout: str, sizes: tuple[object, ...]
) -> list[tuple[str, tuple[object, ...]]]:
    truth = work / "truth.json"
    load = ("--load", checkpoint, "--fp32", *sizes)
    prompts = ("--prompts-path", work / "prompts.jsonl", "--steps", 3, "--osl", 8)
    output = ("--validate-output", work / f"validate {layout}.json")
    kept = ("--save-ground-truth-path" if layout == "TP=1" else "--ground-truth-path", truth)
    jobs = [("validate", (*load, *prompts, *output, *kept))]
    if layout == "TP=1":
        short = ("--ground-truth-path", truth, "--steps", 1, "--osl", 4)
        jobs.append(
            ("validate", (*load, *short, "--validate-output", work / "validate truth.json"))
        )
    return jobs
