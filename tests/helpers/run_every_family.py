"""Run every stage on a tiny random model of every family, beside the table of docs/models.md.

PYTHONPATH=.:tests/helpers python tests/helpers/run_every_family.py WORK [--bf16] [family ...]

About 200 runs, so no test: some ten minutes on two cores. A line a family; what does not do as the
table says is shown with its error, and the exit code is 1.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import stages_table
import tools
import torch
from questions import FEW_SHOTS, write_questions


def jobs(
    source: Path, work: Path, data: Path, precision: str
) -> dict[str, tuple[str, tuple[object, ...]]]:
    """Stage -> a job for :func:`tools.run_stages`; later ones read what earlier ones made."""
    load = ("--pretrained-model-path", source, precision)
    chat = data / "chat.jsonl"
    training = (
        *("--finetune-data-files", chat, precision, "--seq-length", 128, "--train-iters", 3),
        *("--micro-batch-size", 2, "--log-interval", 1, "--eval-iters", 0, "--lr", 1e-3),
    )
    calibration = ("--calib-size", 4, "--calib-max-sequence-length", 64, "--calib-dataset", chat)
    prompts = ("--prompts-path", data / "prompts.jsonl")
    questions = ("--few-shots", FEW_SHOTS, "--mmlu-dataset", data / "questions")
    sizes = json.dumps({"hidden_size": 64})
    student = ("--load", work / "finetuned", "--teacher", source)
    drafted = ("--load", work / "drafted", precision, "--osl", 6, "--steps", 2, *prompts)
    # In 16 bits two texts that are computed in other pieces may differ at a tie.
    identical = ("--require-identical",) if precision == "--fp32" else ()
    quantized = ("--load", work / "quantized", precision)
    return {
        "convert": ("convert", (*load, "--save", work / "converted")),
        "quantize": ("quantize", (*load, "--save", work / "quantized", *calibration)),
        "prune": ("prune", (*load, "--save", work / "pruned", "--prune-export-config", sizes,
                            "--skip-generate", *calibration)),
        "finetune": ("finetune", (*load, "--save", work / "finetuned", *training)),
        "distill": ("distill", (*student, "--save", work / "distilled", *training)),
        "eagle3": ("eagle3", (*load, "--save", work / "drafted", *training)),
        "generate": ("generate", (*load, "--output", work / "answers.jsonl", *prompts,
                                  "--max-new-tokens", 4)),
        "mmlu": ("mmlu", (*load, *questions, "--mmlu-output", work / "mmlu.json")),
        "validate": ("validate", (*drafted, *identical,
                                  "--validate-output", work / "validate.json")),
        "export": ("export", (*quantized, "--export-dir", work / "exported")),
    }  # fmt: skip


def surprises(name: str, root: Path, precision: str) -> list[str]:
    """What the stages do other than the table says."""
    work, dtype = root / name, torch.float32 if precision == "--fp32" else torch.bfloat16
    tools.random_model(work / "source", name, dtype, max_position_embeddings=2048)
    model = stages_table.Model(tools.FAMILIES[name], work / "described")
    answers, found = stages_table.row(model), []
    for stage, job in jobs(work / "source", work, root, precision).items():
        if stage == "quantize" and model.refusal(stage, *stages_table.FORMATS["FP8"]):
            job = (stage, (*job[1], *stages_table.FORMATS["INT8 and INT4 weights"]))
        if stage == "export" and answers["quantize"].answer == "no":
            job = ("export", ("--load", work / "converted", *job[1][2:]))
        try:
            tools.run_stages(job)
            done, why = "yes", ""
        except AssertionError as error:
            told = [line for line in str(error).splitlines() if "rror" in line or "cause:" in line]
            done, why = "no", " / ".join(told)[:500]
        if done != answers[stage].answer:
            found.append(f"{stage}: the table says {answers[stage].answer}. {why}")
    return found


def main() -> None:
    root, names = Path(sys.argv[1]), sys.argv[2:]
    precision = "--bf16" if "--bf16" in names else "--fp32"
    root.mkdir(parents=True, exist_ok=False)
    (root / "questions").mkdir()
    write_questions(root / "questions")
    tools.write_conversations(root / "chat.jsonl")
    (root / "prompts.jsonl").write_text(json.dumps({"turns": ["What is 3 + 4?"]}) + "\n")
    failed = 0
    for name in [each for each in names if each != "--bf16"] or tools.FAMILIES:
        found = surprises(name, root, precision)
        failed += len(found)
        print(name, "as in the table" if not found else "\n  ".join(["", *found]), flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
