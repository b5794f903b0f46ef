"""The evaluate stage: what transformers computes, at every layout; gates, flips and its errors.

The models are random and differ by a little noise, so that some answers flip and some do not. What
is expected is computed here from transformers' logits, with loops of its own.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import served
import tools
import torch
from questions import FEW_SHOTS, write_questions
from served_model import ServedModel

import evaluate
from post_training.common import validity
from post_training.common.errors import UsageError
from post_training.evaluation.harness_options import HarnessOptions

WINDOW, STRIDE, NEW = 96, 40, 32
LAYOUTS = {
    "TP=1": (1, ()),
    "TP=2": (2, ("--tensor-model-parallel-size", 2)),
    "PP=2, DP=2": (4, ("--pipeline-model-parallel-size", 2)),
}


def made(folder: Path, noise: float):
    """A model that likes to say digits, with a little noise in every weight."""
    model = tools.random_model(folder, "qwen3", max_position_embeddings=2048)
    digits = [tools.byte_tokenizer().encode(digit)[0] for digit in "0123456789"]
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        model.lm_head.weight[digits] *= 2.5
        for parameter in model.parameters():
            parameter += noise * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    work = tmp_path_factory.mktemp("evaluate")
    reference, model = made(work / "reference", 0.0), made(work / "model", 0.004)
    texts = ["".join(f"{i} and {j}; " for j in range(5 + 9 * (i % 5))) for i in range(24)]
    (work / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    (work / "questions").mkdir()
    write_questions(work / "questions")
    problems = [f"{i} apples and {i + 3} pears: how many? " * (1 + i % 3) for i in range(6)]
    rows = [{"question": q, "answer": f"Add.\n#### {2 * i + 3}"} for i, q in enumerate(problems)]
    (work / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples = [{"question": f"{i} plus 1?", "target": f"It is {i + 1}."} for i in range(3)]
    (work / "prompt.yaml").write_text(json.dumps({"fewshot_config": {"samples": samples}}))
    return SimpleNamespace(
        work=work, model=model, reference=reference, texts=texts, problems=problems
    )


def flags(setting, output: Path, *more: object) -> tuple[object, ...]:
    work = setting.work
    return (
        *("--pretrained-model-path", work / "model", "--reference", work / "reference", "--fp32"),
        *("--text", work / "text.jsonl", "--text-window", WINDOW, "--text-stride", STRIDE),
        *("--text-batch-size", 3, "--mmlu-dataset", work / "questions", "--few-shots", FEW_SHOTS),
        *("--mmlu-batch-size", 4, "--evaluate-output", output),
        *("--gsm8k-dataset", work / "problems.jsonl", "--gsm8k-prompt", work / "prompt.yaml"),
        *("--gsm8k-shots", 2, "--gsm8k-max-new-tokens", NEW, "--gsm8k-batch-size", 4),
        *more,
    )


@pytest.fixture(scope="module")
def reports(setting):
    """The report of each layout, and what the stage printed at TP=1, where it has bounds."""
    found = {}
    for layout, (processes, sizes) in LAYOUTS.items():
        output = setting.work / f"{layout}.json"
        drop = ("--max-drop", 0.0, "mmlu=1", "gsm8k_strict=1", "gsm8k_flexible=1")
        bounds = ("--max-kl", 1e-9, *drop) if layout == "TP=1" else ()
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
    assert set(report["measures"]) == {"mmlu", "gsm8k_strict", "gsm8k_flexible"}
    mine, other = (entry[role]["answers"] for role in ("model", "reference"))
    rows = (setting.work / "TP=1.flips.jsonl").read_text().splitlines()
    written = [json.loads(row) for row in rows]
    flips = [row for row in written if row["measure"] == "mmlu"]
    difference = entry["difference"]
    assert difference["difference"] == pytest.approx(
        entry["model"]["accuracy"] - entry["reference"]["accuracy"]
    )
    assert len(flips) == difference["gained"] + difference["lost"] > 0
    assert report["flipped"]["rows"] == len(written)
    for flip in flips:
        subject, number = flip["id"].split("/")
        assert mine[subject][int(number)] == flip["model"]
        assert other[subject][int(number)] == flip["reference"]
        assert (flip["model"] == flip["expected"]) == (flip["change"] == "gained")
    low, high = difference["interval_95"]
    assert low < difference["difference"] < high


def test_word_problems_are_answered_as_by_transformers(setting, reports):
    """Greedily, from the prompt as it is written in the paper; the last number is the answer."""
    tokenizer = tools.byte_tokenizer()
    said: set[str] = set()
    solved = "Q: 0 plus 1?\nA: It is 1.\n\nQ: 1 plus 1?\nA: It is 2.\n\n"
    for role in ("model", "reference"):
        expected = []
        for question in setting.problems:
            ids = torch.tensor([tokenizer.encode(f"{solved}Q: {question}\nA:")])
            ((*new,),) = tools.transformers_tokens(getattr(setting, role), ids, NEW)
            ends = [place for place, token in enumerate(new) if token == tokenizer.eos_token_id]
            new = new[: min(ends, default=NEW)]
            text = tokenizer.decode(new, skip_special_tokens=True).split("Q:")[0]
            found = re.findall(r"-?[$0-9.,]{2,}|-?[0-9]+", text)
            expected.append(found[-1] if found else "[invalid]")
        answers = reports["TP=1"]["measures"]["gsm8k_flexible"][role]["answers"]
        assert answers == expected
        assert answers == expected
        said |= set(answers)
    assert len(said) > 2


def test_servers_give_the_same_figures(setting, reports):
    """One as vLLM and one as SGLang, against the models that the stage loads."""
    tokenizer, output = tools.byte_tokenizer(), setting.work / "served.json"
    of_model, of_reference = (
        ServedModel(each, tokenizer) for each in (setting.model, setting.reference)
    )
    sglang = {"/v1/models": served.models("tiny", owner="sglang")}
    more = (
        *("--pretrained-model-path", setting.work / "model", "--evaluate-output", output),
        *("--fraction", 0.3, "--gsm8k-limit", 1, "--max-drop", 1.0, "--server-concurrency", 2),
    )
    with (
        served.scripted(of_model.post) as server,
        served.scripted(of_reference.post, sglang) as other,
    ):
        words = (*flags(setting, output, *more), "--reference", other.url)
        found = served.run(evaluate.STAGE, "--server", server.url, *words)
        for refused in (("--max-kl", 1.0), ("--weights-only",), ("--reference", setting.work)):
            with pytest.raises(UsageError, match=f"{refused[0]}.* with --server"):
                served.run(evaluate.STAGE, "--server", server.url, *words, *refused)
        before = setting.work / "before.json"
        recorded = {
            "stage": "evaluate",
            "inputs": [each for each in found["inputs"] if each["role"] in ("questions", "text")],
            "measures": {"mmlu": {"model": found["measures"]["mmlu"]["reference"]}},
            "text": {**found["text"], "model": found["text"]["reference"]},
        }
        before.write_text(json.dumps(recorded))
        again = (*words, "--gsm8k-dataset", "", "--reference", before)
        compared = served.run(evaluate.STAGE, "--server", server.url, *again)
        with pytest.raises(UsageError, match=r"before\.json\n.*mmlu had few_shots 2, and has 1"):
            served.run(evaluate.STAGE, "--server", server.url, *again, "--few-shots", 1)
        of_model.echoes = False
        with pytest.raises(UsageError, match=r"--text with --server.*\n.*Echo is not compatible"):
            served.run(evaluate.STAGE, "--server", server.url, *words)
    local = reports["TP=1"]
    for role in ("model", "reference"):
        assert found["text"][role] == {
            "loss": pytest.approx(local["text"][role]["loss"], rel=1e-5),
            "perplexity": pytest.approx(local["text"][role]["perplexity"], rel=1e-4),
            "interval_95": pytest.approx(local["text"][role]["interval_95"], rel=1e-4),
        }
        theirs, ours = ({n: e[role] for n, e in r["measures"].items()} for r in (local, found))
        assert ours["mmlu"]["answers"] == {
            subject: letters[:3] for subject, letters in theirs["mmlu"]["answers"].items()
        }
        for name in ("gsm8k_strict", "gsm8k_flexible"):
            assert ours[name]["answers"] == theirs[name]["answers"][:1]
    ratio = local["text"]["difference"]["perplexity_ratio"]
    assert found["text"]["difference"]["perplexity_ratio"] == pytest.approx(ratio, rel=1e-5)
    assert "kl" not in found["text"]
    assert compared["measures"]["mmlu"]["difference"] == found["measures"]["mmlu"]["difference"]
    assert compared["text"]["reference"] == found["text"]["reference"]
    assert found["measures"]["mmlu"]["difference"]["mcnemar_p"] <= 1
    assert found["reference_server"]["engine"] == "sglang"
    assert json.loads(output.read_text())["flipped"]["rows"] == found["flipped"]["rows"]


def test_broken_bounds_end_with_code_1_and_the_figures(setting, reports):
    broken = reports["TP=1"]["broken_bounds"]
    assert f"mean KL divergence {reports['TP=1']['text']['kl']['mean']:.6f}" in broken[0]
    assert len(broken) == 1  # a bound of its own lets MMLU drop
    assert [reports[name]["passed"] for name in ("TP=1", "TP=2")] == [False, True]
    for name, passed in (("TP=1", False), ("TP=2", True)):
        made = setting.work / f"{name}.json"
        assert validity.is_valid(made, str(setting.work / "model")) == passed
    assert f"error: {broken[0]}" in setting.printed.stderr
    assert "perplexity" in setting.printed.stdout


def test_a_report_is_of_its_solved_problems(setting, reports):
    """Which say what is asked, as the questions do."""
    prompt = setting.work / "prompt.yaml"
    (entry,) = [e for e in reports["TP=2"]["inputs"] if e["role"] == "solved problems"]
    assert entry["path"] == str(prompt) and "sha256" in entry
    before = prompt.read_text()
    prompt.write_text(before.replace("It is", "It's"))
    made = setting.work / "TP=2.json"
    try:
        assert not validity.is_valid(made, str(setting.work / "model"))
    finally:
        prompt.write_text(before)
    harness = HarnessOptions(tasks="a", tasks_path="~/further")
    assert harness.read() == {"tasks": str(Path.home() / "further")}
    assert HarnessOptions(tasks_path="x").read() == {"tasks": None}


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (("--text-stride", 97), "--text-stride 97"),
        (("--text", "/nowhere/text.txt"), "--text /nowhere/text.txt"),
        (("--reference", "/nowhere/model"), "--reference /nowhere/model"),
        (("--max-drop", "gsm9k=0.1"), "--max-drop gsm9k"),
        (("--gsm8k-shots", 4), "--gsm8k-shots 4"),
        (("--lower-bound", 70), "--lower-bound 70"),
        (("--max-kl", -1), "--max-kl -1"),
        (("--context-parallel-size", 2), "CP=2"),
        (("--reference", "", "--max-kl", 0.1), "--max-kl"),
        (("--text", "", "--max-kl", 0.1), "--max-kl 0.1"),
        (("--text", "", "--mmlu-dataset", "", "--gsm8k-dataset", ""), "nothing to evaluate"),
    ],
)
def test_usage_errors_come_before_anything_is_loaded(setting, more, expected):
    done = tools.run("evaluate.py", *flags(setting, setting.work / "x", *more), "--check", code=2)
    assert f"error: {expected}" in done.stderr
    assert "remedy:" in done.stderr
