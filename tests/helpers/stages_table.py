"""The table of families and stages in docs/models.md, asked of the stages' own checks.

A cell is what the checks of a stage say about a small model of a family, before any weight is
loaded: nothing, or a reason. As a program it prints the table.

PYTHONPATH=.:tests/helpers python tests/helpers/stages_table.py
"""

from __future__ import annotations

import importlib
import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from model_folders import write_checkpoint, write_model

from post_training.cli.stage import make_plan
from post_training.common.errors import UsageError
from post_training.models.families import registry as families
from post_training.models.families.base import Family

STAGES = (
    *("convert", "quantize", "prune", "distill", "finetune", "eagle3"),
    *("generate", "mmlu", "validate", "export"),
)
# What a model may be quantized with, and flags that ask for it.
FORMATS = {
    "FP8": ("--export-quant-cfg", "FP8_DEFAULT_CFG"),
    "NVFP4": ("--export-quant-cfg", "NVFP4_DEFAULT_CFG"),
    "INT8 and INT4 weights": ("--export-quant-cfg", "INT8_WEIGHT_ONLY_CFG"),
    "SmoothQuant (INT8 inputs)": ("--export-quant-cfg", "INT8_SMOOTHQUANT_CFG"),
    "AWQ": ("--export-quant-cfg", "NVFP4_AWQ_LITE_CFG"),
    "GPTQ": ("--export-quant-cfg", "INT8_GPTQ_CFG"),
    "a quantized KV cache": ("--export-kv-cache-quant", "fp8"),
}
# Sizes that every kernel takes, so that only a family's own rules refuse.
_SIZES = {
    **{"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "moe_intermediate_size": 256},
    **{"intermediate_size_mlp": 512, "q_lora_rank": 128, "kv_lora_rank": 128, "v_head_dim": 64},
    **{"qk_nope_head_dim": 48, "qk_rope_head_dim": 16},
    **{"moe_shared_expert_intermediate_size": 256, "n_shared_experts": 1},
    **{"mamba_num_heads": 8, "mamba_head_dim": 64},
}


class Cell(NamedTuple):
    """``yes`` or ``no``, and what there is to say about it."""

    answer: str
    note: str = ""

    @classmethod
    def of(cls, refusal: str) -> Cell:
        return cls("no", refusal) if refusal else cls("yes")

    def text(self, notes: list[str]) -> str:
        return f"{self.answer} ({notes.index(self.note) + 1})" if self.note else self.answer


class Model:
    """A small model of a family without weights: a folder, and checkpoints as if made from it."""

    def __init__(self, family: Family, root: Path) -> None:
        self.root = root
        config = family.tiny_config()
        text = config.get("text_config", config)
        text.update({key: size for key, size in _SIZES.items() if key in text})
        self.folder, self.teacher = (self._folder(name, config) for name in ("model", "teacher"))
        described = families.from_huggingface(config).to_json()
        self.made: dict[str, Any] = {"stage": "convert", "architecture": described}
        self.data = root / "chat.jsonl"
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        self.data.write_text(json.dumps({"messages": turns}) + "\n")

    def _folder(self, name: str, config: dict[str, Any]) -> Path:
        folder = write_model(self.root / name, config)
        (folder / "tokenizer.json").write_text("{}")
        return folder

    def plan(self, stage: str, *flags: object) -> Any:
        """The plan of a stage; UsageError if its checks refuse the model."""
        words = (*flags, "--tokenizer-model", self.folder, "--check")
        return make_plan(importlib.import_module(stage).STAGE, list(map(str, words)))

    def source_of(self, stage: str) -> tuple[object, ...]:
        """Flags that name a stage's inputs and outputs."""
        source, save = ("--pretrained-model-path", self.folder), ("--save", self.root / "new")
        training = ("--finetune-data-files", self.data, "--train-iters", 1, "--seq-length", 64)
        calibration = ("--calib-dataset-path-or-name", self.data)
        prompts = ("--prompts-path", self.data, "--output", self.root / "answers.jsonl")
        found: dict[str, tuple[object, ...]] = {
            "convert": (*source, *save),
            "quantize": (*source, *save, *calibration),
            "prune": (*source, *save, *calibration, "--prune-target-params", "1k"),
            "distill": (*source, *save, *training, "--teacher", self.teacher),
            "finetune": (*source, *save, *training),
            "eagle3": (*source, *save, *training),
            "generate": (*source, *prompts),
            "mmlu": source,
        }
        return found[stage]

    def refusal(self, stage: str, *flags: object) -> str:
        """Why a stage refuses the model; empty where it does not."""
        try:
            self.plan(stage, *self.source_of(stage), *flags)
        except UsageError as error:
            return error.cause
        return ""

    def checkpoint(self, name: str, **more: Any) -> Path:
        return write_checkpoint(self.root / name, **self.made, **more)


def quantize(model: Model) -> Cell:
    """Formats that the family's rules refuse, by reason."""
    reasons: dict[str, list[str]] = {}
    for name, flags in FORMATS.items():
        if reason := model.refusal("quantize", *flags):
            reasons.setdefault(reason, []).append(name)
    if any(len(names) == len(FORMATS) for names in reasons.values()):
        return Cell("no", *reasons)
    texts = [f"not {', '.join(names)}: {reason}" for reason, names in reasons.items()]
    return Cell("yes", "; ".join(texts))


def validate(model: Model) -> Cell:
    """Of the draft that eagle3 would train."""
    if reason := model.refusal("eagle3"):
        return Cell("no", reason)
    draft = model.plan("eagle3", *model.source_of("eagle3")).draft
    model.plan("validate", "--load", model.checkpoint("drafted", draft=draft.to_json()))
    return Cell("yes")


def export(model: Model) -> Cell:
    flags = ("--load", model.checkpoint("converted"), "--export-dir", model.root / "exported")
    model.plan("export", *flags, "--pretrained-model-name", model.folder)
    return Cell("yes")


def row(model: Model) -> dict[str, Cell]:
    """What each stage says about the model, in the order of ``STAGES``."""
    own = {"quantize": quantize, "validate": validate, "export": export}
    return {
        stage: own[stage](model) if stage in own else Cell.of(model.refusal(stage))
        for stage in STAGES
    }


def markdown_table() -> str:
    """A line an architecture, and the reasons as numbered notes."""
    notes: list[str] = []
    lines = ["| `architectures` | " + " | ".join(STAGES) + " |", "|---" * (len(STAGES) + 1) + "|"]
    with tempfile.TemporaryDirectory() as folder:
        for family in families.FAMILIES.values():
            cells = row(Model(family, Path(folder) / family.name)).values()
            told = dict.fromkeys(cell.note for cell in cells if cell.note)
            notes += [note for note in told if note not in notes]
            texts = [cell.text(notes) for cell in cells]
            lines.append(f"| `{family.architecture}` | {' | '.join(texts)} |")
    return "\n".join([*lines, "", *(f"{n}. {note}" for n, note in enumerate(notes, 1))]) + "\n"


if __name__ == "__main__":
    print(markdown_table())
