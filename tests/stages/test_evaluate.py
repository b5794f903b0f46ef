"""The evaluate stage: what transformers computes, at every layout; gates, flips and its errors.

The models are random and differ by a little noise, so that some answers flip and some do not. What
is expected is computed here from transformers' logits, with loops of its own.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import tools
import torch
from questions import FEW_SHOTS, write_questions

WINDOW, STRIDE = 96, 40
LAYOUTS = {
    "TP=1": (1, ()),
    "TP=2": (2, ("--tensor-model-parallel-size", 2)),
    "PP=2, DP=2": (4, ("--pipeline-model-parallel-size", 2)),
}


def noisy(model, folder: Path, scale: float):
    """A copy of the model with a little noise in every weight, saved beside it."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    tools.chat_tokenizer().save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    work = tmp_path_factory.mktemp("evaluate")
    reference = tools.random_model(work / "reference", "qwen3", max_position_embeddings=2048)
    model = tools.random_model(work / "model", "qwen3", max_position_embeddings=2048)
    model = noisy(model, work / "model", 0.004)
    texts = ["".join(f"{i} and {j}; " for j in range(5 + 9 * (i % 5))) for i in range(24)]
    (work / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    (work / "questions").mkdir()
    write_questions(work / "questions")
    return SimpleNamespace(work=work, model=model, reference=reference, texts=texts)


def flags(setting, output: Path, *more: object) -> tuple[object, ...]:
    work = setting.work
    return (
        *("--pretrained-model-path", work / "model", "--reference", work / "reference", "--fp32"),
        *("--text", work / "text.jsonl", "--text-window", WINDOW, "--text-stride", STRIDE),
        *("--text-batch-size", 3, "--mmlu-dataset", work / "questions", "--few-shots", FEW_SHOTS),
        *("--mmlu-batch-size", 4, "--evaluate-output", output),
        *more,
    )


@pytest.fixture(scope="module")
def reports(setting):
    """The report of each layout, and what the stage printed at TP=1, where it has bounds."""
    found = {}
    for layout, (processes, sizes) in LAYOUTS.items():
        output = setting.work / f"{layout}.json"
        bounds = ("--max-kl", 1e-9, "--max-drop", 0.0, "mmlu=1") if layout == "TP=1" else ()
        words = flags(setting, output, *sizes, *bounds)
        done = tools.run("evaluate.py", *words, processes=processes, code=1 if bounds else 0)
        found[layout] = json.loads(output.read_text())
        if bounds:
            setting.printed = done
    return found


def expected_text(setting) -> dict[str, float]:
    """Means over the scored tokens, by the definition: token after token."""
    tokenizer = tools.byte_tokenizer()
    sums = dict.fromkeys(("loss", "reference_loss", "kl", "top_1"), 0.0)
    largest, count = 0.0, 0
    for text in setting.texts:
        ids = torch.tensor([tokenizer.encode(text)])
        seen, starts = 1, range(0, ids.shape[1], STRIDE)
        for start in starts:
            window = ids[:, start : start + WINDOW]
            p, q = (
                tools.transformers_logits(each, window)[0].double().log_softmax(-1)
                for each in (setting.reference, setting.model)
            )
            for place in range(max(seen, start + 1), start + window.shape[1]):
                mine, other, right = q[place - start - 1], p[place - start - 1], ids[0, place]
                divergence = float((other.exp() * (other - mine)).sum())
                sums["loss"] -= float(mine[right])
                sums["reference_loss"] -= float(other[right])
                sums["kl"] += divergence
                sums["top_1"] += int(mine.argmax() == other.argmax())
                largest, count = max(largest, divergence), count + 1
            seen = start + window.shape[1]
            if seen == ids.shape[1]:
                break
    return {**{name: value / count for name, value in sums.items()}, "max": largest, "n": count}


def test_text_is_predicted_as_by_transformers(setting, reports):
    expected, found = expected_text(setting), reports["TP=1"]["text"]
    assert (found["tokens"], found["documents"]) == (expected["n"], len(setting.texts))
    assert found["tokens"] == sum(len(text) - 1 for text in setting.texts)
    for role, name in (("model", "loss"), ("reference", "reference_loss")):
        assert found[role]["loss"] == pytest.approx(expected[name], rel=1e-5)
        assert found[role]["perplexity"] == pytest.approx(math.exp(expected[name]), rel=1e-4)
    assert found["kl"]["mean"] == pytest.approx(expected["kl"], rel=1e-4)
    assert found["kl"]["max"] == pytest.approx(expected["max"], rel=1e-3)
    assert found["top_1_agreement"]["share"] == pytest.approx(expected["top_1"], abs=1e-9)
    assert 0 < found["kl"]["mean"] < found["kl"]["max"]
    assert 0.5 < found["top_1_agreement"]["share"] < 1


@pytest.mark.parametrize("layout", ["TP=2", "PP=2, DP=2"])
def test_every_layout_finds_the_same(reports, layout):
    one, other = reports["TP=1"], reports[layout]
    for path in (("model", "loss"), ("kl", "mean"), ("kl", "max"), ("top_1_agreement", "share")):
        mine, theirs = one["text"], other["text"]
        for name in path:
            mine, theirs = mine[name], theirs[name]
        assert theirs == pytest.approx(mine, rel=1e-3), path
    assert other["measures"] == one["measures"]


def test_questions_are_paired_and_those_that_flip_are_written(setting, reports):
    report = reports["TP=1"]
    entry = report["measures"]["mmlu"]
    mine, other = (entry[role]["answers"] for role in ("model", "reference"))
    rows = (setting.work / "TP=1.flips.jsonl").read_text().splitlines()
    flips = [json.loads(row) for row in rows]
    difference = entry["difference"]
    assert difference["difference"] == pytest.approx(
        entry["model"]["accuracy"] - entry["reference"]["accuracy"]
    )
    assert len(flips) == difference["gained"] + difference["lost"] > 0
    assert report["flipped"]["rows"] == len(flips)
    for flip in flips:
        subject, number = flip["id"].split("/")
        assert mine[subject][int(number)] == flip["model"]
        assert other[subject][int(number)] == flip["reference"]
        assert (flip["model"] == flip["expected"]) == (flip["change"] == "gained")
    low, high = difference["interval_95"]
    assert low < difference["difference"] < high


def test_broken_bounds_end_with_code_1_and_the_figures(setting, reports):
    broken = reports["TP=1"]["broken_bounds"]
    assert f"mean KL divergence {reports['TP=1']['text']['kl']['mean']:.6f}" in broken[0]
    assert len(broken) == 1  # a bound of its own lets MMLU drop
    assert f"error: {broken[0]}" in setting.printed.stderr
    assert "perplexity of" in setting.printed.stdout


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (("--text-stride", 97), "--text-stride 97"),
        (("--text", "/nowhere/text.txt"), "--text /nowhere/text.txt"),
        (("--reference", "/nowhere/model"), "--reference /nowhere/model"),
        (("--max-drop", "gsm8k=0.1"), "--max-drop gsm8k"),
        (("--lower-bound", 70), "--lower-bound 70"),
        (("--max-kl", -1), "--max-kl -1"),
        (("--context-parallel-size", 2), "CP=2"),
        (("--reference", "", "--max-kl", 0.1), "--max-kl"),
        (("--text", "", "--max-kl", 0.1), "--max-kl 0.1"),
        (("--text", "", "--mmlu-dataset", ""), "nothing to evaluate"),
    ],
)
def test_usage_errors_come_before_anything_is_loaded(setting, more, expected):
    done = tools.run("evaluate.py", *flags(setting, setting.work / "x", *more), "--check", code=2)
    assert f"error: {expected}" in done.stderr
    assert "remedy:" in done.stderr
