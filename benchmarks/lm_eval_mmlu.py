"""MMLU of ``evaluate.py`` beside lm-evaluation-harness' own transformers model.

    python benchmarks/lm_eval_mmlu.py MODEL MMLU --share 0.1 --batch 32 --work /tmp/mmlu [-- FLAGS]

MODEL is a Hugging Face folder, MMLU a folder with test.jsonl and dev.jsonl (columns of cais/mmlu).
A share of each subject's questions, the same for both, is asked with five solved ones before it, by
the harness' task file. FLAGS go to ``evaluate.py`` (``--text FILE`` adds perplexity). Prints a
line of JSON: questions, equal answers, both scores, seconds of both from the start of Python to its
end; the questions with other answers are in WORK/differing.json, with the log probabilities of the
harness' four choices. Needs lm_eval, on whose path --lm-eval-path may say.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SHOTS = 5
ABOUT = "The following are multiple choice questions (with answers) about {}.\n\n"
LETTERS = "ABCD"


def write_questions(mmlu: Path, folder: Path, share: float) -> dict[str, int]:
    """The first questions of each subject, in one file and by subject; questions by subject."""
    rows: dict[str, dict[str, list[str]]] = {"test": defaultdict(list), "dev": defaultdict(list)}
    for split, subjects in rows.items():
        for line in (mmlu / f"{split}.jsonl").read_text(encoding="utf-8").split("\n"):
            if line:
                subjects[json.loads(line)["subject"]].append(line)
    counts = {name: math.ceil(len(rows["test"][name]) * share) for name in sorted(rows["test"])}
    folder.mkdir(parents=True, exist_ok=True)
    for split, subjects in rows.items():
        kept = {
            name: subjects[name][: counts[name] if split == "test" else None] for name in counts
        }
        lines = [line for name in counts for line in kept[name]]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        for name, own in kept.items():
            path = folder / f"{name}.{split}.jsonl"
            path.write_text("\n".join(own) + "\n", encoding="utf-8")
    return counts


def ours(model: Path, questions: Path, report: Path, batch: str, flags: list[str]) -> float:
    """Seconds of the stage."""
    (questions / "own").mkdir(exist_ok=True)
    for split in ("test", "dev"):
        (questions / "own" / f"{split}.jsonl").write_bytes(
            (questions / f"{split}.jsonl").read_bytes()
        )
    command: list[object] = [sys.executable, "evaluate.py", "--pretrained-model-path", model]
    command += ["--mmlu-dataset", questions / "own", "--few-shots", SHOTS, *flags]
    command += ["--mmlu-batch-size", batch, "--evaluate-output", report]
    started = time.perf_counter()
    subprocess.run([str(word) for word in command], cwd=ROOT, check=True)
    return time.perf_counter() - started


def theirs(model: Path, questions: Path, output: Path, batch: str, dtype: str) -> None:
    """In a process of its own: the harness with its transformers model."""
    import lm_eval
    import torch
    import yaml
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    package = Path(str(lm_eval.__file__)).parent
    template: dict[str, Any] = yaml.safe_load(
        (package / "tasks/mmlu/default/_default_template_yaml").read_text(encoding="utf-8")
    )
    tasks = questions / "tasks"
    tasks.mkdir(exist_ok=True)
    subjects = sorted(
        path.name.removesuffix(".test.jsonl") for path in questions.glob("*.test.jsonl")
    )
    for name in subjects:
        files = {split: str(questions / f"{name}.{split}.jsonl") for split in ("test", "dev")}
        task = {
            **template,
            "task": f"local_{name}",
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": files},
            "description": ABOUT.format(name.replace("_", " ")),
            "num_fewshot": SHOTS,
        }
        (tasks / f"{name}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    asked = batch if batch == "auto" else int(batch)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = simple_evaluate(
        model=HFLM(pretrained=str(model), dtype=dtype, batch_size=asked, device=device),
        tasks=[f"local_{name}" for name in subjects],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
    )
    scores = {}
    for name in subjects:
        rows = sorted(found["samples"][f"local_{name}"], key=lambda row: row["doc_id"])
        scores[name] = [
            {"logprobs": [float(value) for value, _ in row["filtered_resps"]], "acc": row["acc"]}
            for row in rows
        ]
    output.write_text(json.dumps(scores), encoding="utf-8")


def compare(report: Path, scores: Path, differing: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    mine = found["measures"]["mmlu"]["model"]
    count = equal = right = 0
    others = []
    for subject, rows in json.loads(scores.read_text(encoding="utf-8")).items():
        for number, (letter, row) in enumerate(zip(mine["answers"][subject], rows, strict=True)):
            values = row["logprobs"]
            best = LETTERS[values.index(max(values))]
            count, equal, right = count + 1, equal + (best == letter), right + int(row["acc"])
            if best != letter:
                margin = sorted(values)[-1] - values[LETTERS.index(letter)]
                others.append(
                    {"subject": subject, "question": number, "ours": letter, "theirs": best}
                    | {"logprobs": values, "theirs_minus_ours": margin}
                )
    differing.write_text(json.dumps(others, indent=1), encoding="utf-8")
    return {
        "questions": count,
        "equal": equal,
        "share_equal": round(equal / count, 5),
        "largest_margin_of_differing": max(
            (each["theirs_minus_ours"] for each in others), default=0
        ),
        "score_ours": round(mine["correct"] / count, 5),
        "score_theirs": round(right / count, 5),
    }


def main() -> None:
    words, flags = sys.argv[1:], []
    if "--" in words:
        words, flags = words[: words.index("--")], words[words.index("--") + 1 :]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("mmlu", type=Path)
    parser.add_argument("--share", type=float, default=0.1)
    parser.add_argument("--batch", default="auto", help="of ours")
    parser.add_argument("--their-batch", default="32")
    parser.add_argument("--dtype", default="bfloat16", help="of the harness' model")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--lm-eval-path", default="", help="of packages, before PYTHONPATH")
    parser.add_argument("--theirs-alone", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    work: Path = args.work
    questions, scores, report = work / "questions", work / "theirs.json", work / "ours.json"
    if args.theirs_alone:
        theirs(args.model, questions, scores, args.their_batch, args.dtype)
        return
    write_questions(args.mmlu, questions, args.share)
    seconds = ours(args.model, questions, report, args.batch, [*flags, "--overwrite"])
    paths = [args.lm_eval_path, os.environ.get("PYTHONPATH", "")]
    started = time.perf_counter()
    subprocess.run(
        # Not from the repository's root, whose evaluate.py has the name of a package of the hub.
        [sys.executable, str(Path(__file__).resolve()), *words, "--theirs-alone"],
        env={**os.environ, "PYTHONPATH": ":".join(filter(None, paths))},
        check=True,
    )
    theirs_s = time.perf_counter() - started
    found = compare(report, scores, work / "differing.json")
    found |= {"ours_s": round(seconds, 1), "theirs_s": round(theirs_s, 1)}
    print(json.dumps({**found, "ratio": round(theirs_s / seconds, 2)}))


if __name__ == "__main__":
    main()
