"""The mmlu stage: the answers of an independent implementation, at every layout, and its errors.

The model is random and the questions are synthetic: what is compared is which letter has the
largest logit, question by question. The byte-level tokenizer has the blank before the letter as a
token of its own.
"""

import copy
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import served
import tools
import torch
from questions import FEW_SHOTS, SUBJECTS, write_questions
from served_model import ServedModel

import mmlu
from post_training.cli.stage import make_plan
from post_training.common.errors import UsageError
from post_training.evaluation import mmlu_asked, mmlu_data, mmlu_prompts

LAYOUTS = {
    "TP=1": (1, ()),
    "TP=2": (2, ("--tensor-model-parallel-size", 2)),
    "PP=2": (2, ("--pipeline-model-parallel-size", 2)),
    "DP=2": (2, ()),
}


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A model, its folder, the questions, and where reports go."""
    work = tmp_path_factory.mktemp("mmlu")
    model = tools.random_model(work / "model", "qwen3", max_position_embeddings=2048)
    (work / "questions").mkdir()
    return SimpleNamespace(
        work=work,
        model=model,
        folder=work / "model",
        questions=write_questions(work / "questions"),
    )


def flags(setting, report: Path, *more: object) -> tuple[object, ...]:
    return (
        *("--pretrained-model-path", setting.folder, "--mmlu-dataset", setting.questions),
        *("--few-shots", FEW_SHOTS, "--mmlu-batch-size", 3, "--fp32", "--mmlu-output", report),
        *more,
    )


@pytest.fixture(scope="module")
def outputs(setting):
    """What the stage printed at each layout."""
    found = {}
    for layout, (processes, sizes) in LAYOUTS.items():
        bound, code = (1.0, 1) if layout == "TP=1" else (0.0, 0)
        more = (*sizes, "--lower-bound", bound)
        words = flags(setting, setting.work / f"{layout}.json", *more)
        found[layout] = tools.run("mmlu.py", *words, processes=processes, code=code)
    return found


@pytest.fixture(scope="module")
def reports(setting, outputs):
    """The stage's report at each layout."""
    return {layout: json.loads((setting.work / f"{layout}.json").read_text()) for layout in outputs}


def reference_answers(setting) -> dict[str, str]:
    """Letters by transformers: one whole prompt after the other, nothing shared or padded."""
    tokenizer = tools.byte_tokenizer()
    benchmark = mmlu_data.load(str(setting.questions), FEW_SHOTS)
    found: dict[str, str] = {}
    for subject, questions in benchmark.test.items():
        for question in questions:
            text = mmlu_prompts.prompt(question, benchmark.dev[subject]) + " "
            ids = torch.tensor([tokenizer.encode(text)])
            last = tools.transformers_logits(setting.model, ids)[0, -1]
            letters = [tokenizer.encode(letter)[0] for letter in "ABCD"]
            found[subject] = found.get(subject, "") + "ABCD"[int(last[letters].argmax())]
    return found


def test_answers_are_those_of_transformers(setting, reports):
    expected = reference_answers(setting)
    assert reports["TP=1"]["answers"] == expected
    assert len(set("".join(expected.values()))) > 1, "a model that always says A proves nothing"


@pytest.mark.parametrize("layout", ["TP=2", "PP=2", "DP=2"])
def test_every_layout_gives_the_same_answers(reports, layout):
    for key in ("answers", "accuracy", "correct", "total", "subjects", "macro_accuracy"):
        assert reports[layout][key] == reports["TP=1"][key]


SERVERS = {
    "vllm": ({}, {"owner": "vllm"}),
    "names": ({"most": 5}, {"owner": "someone"}),
    "echo alone": ({"most": 1}, {"owner": "vllm"}),
    "sglang": ({"most": 0, "echoes": False}, {"owner": "sglang"}),
}


@pytest.mark.parametrize("kind", SERVERS)
def test_a_server_gives_the_same_answers(setting, reports, kind):
    """Letters among the most probable tokens, by number or by name; else each by itself."""
    how, models = SERVERS[kind]
    served_model = ServedModel(setting.model, tools.byte_tokenizer(), **how)
    report = setting.work / f"{kind}.json"
    words = ("--tokenizer-model", setting.folder, "--mmlu-dataset", setting.questions)
    words += ("--few-shots", FEW_SHOTS, "--mmlu-output", report, "--server-concurrency", 2)
    words += ("--fraction", 0.3)  # three of a subject's seven questions
    pages = {"/v1/models": served.models("tiny", **models)}
    with served.scripted(served_model.post, pages) as server:
        found = served.run(mmlu.STAGE, "--server", server.url, *words)
    assert found["answers"] == {
        subject: letters[:3] for subject, letters in reports["TP=1"]["answers"].items()
    }
    assert found["total"] == 9
    assert found["server"]["model"] == "tiny"
    assert json.loads(report.read_text()) == found


@pytest.mark.parametrize(
    ("how", "tokenizer", "expected"),
    [
        ({"most": 0, "echoes": False}, None, r"no log probabilities.*greater than.*\n.*vLLM"),
        ({"most": 5, "echoes": False}, None, "MMLU's question 1 with --server"),
        ({"broken": True}, None, "a log probability is nan: the model's logits are not finite"),
        ({}, "other", r"it makes \d+ tokens of a text of which the server makes \d+"),
    ],
)
def test_what_a_server_cannot_score_is_refused(setting, how, tokenizer, expected):
    other = copy.deepcopy(tools.byte_tokenizer())
    if tokenizer:
        other.add_tokens(["multiple choice"])
    served_model = ServedModel(setting.model, other, **how)
    if "most" in how:  # no letter is among so few
        letters = [other.encode(letter)[0] for letter in "ABCD"]
        inner = served_model.logprobs

        def unlikely(ids):
            rows = inner(ids).clone()
            rows[:, letters] = -100.0
            return rows

        served_model.logprobs = unlikely
    words = ("--tokenizer-model", setting.folder, "--mmlu-dataset", setting.questions)
    words += ("--mmlu-output", setting.work / "never.json")
    with (
        served.scripted(served_model.post) as server,
        pytest.raises(UsageError, match=expected),
    ):
        served.run(mmlu.STAGE, "--server", server.url, *words)


def test_the_report_has_score_cost_and_origin(setting, reports):
    report = reports["TP=1"]
    assert (report["total"], report["few_shots"], report["fraction"]) == (21, FEW_SHOTS, 1.0)
    low, high = report["interval_95"]
    assert low < report["accuracy"] < high
    assert set(report["subjects"]) == set(SUBJECTS)
    assert report["inputs"][0]["path"] == str(setting.folder)
    assert "mmlu.py" in report["command"]
    assert report["versions"]["torch"]
    # Each subject's examples are computed once, so well below half of the prompts' tokens.
    assert report["computed_tokens"] < report["prompt_tokens"] / 2


def test_a_score_below_the_lower_bound_fails_with_both_numbers(reports, outputs):
    """The run at TP=1 has a bound that no random model reaches, and ends with code 1."""
    accuracy = reports["TP=1"]["accuracy"]
    done = outputs["TP=1"]
    assert f"error: MMLU accuracy {accuracy:.4f} is below --lower-bound 1.0000" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_table_names_every_subject_and_the_average(reports, outputs):
    table = outputs["TP=1"].stdout
    assert all(subject in table for subject in SUBJECTS)
    low, high = reports["TP=1"]["interval_95"]
    assert f"{low:.3f} - {high:.3f}" in table


def test_the_report_lies_beside_the_model_by_default(setting, monkeypatch):
    def planned(model: object) -> Path:
        words = ["--pretrained-model-path", str(model), "--mmlu-dataset", str(setting.questions)]
        return make_plan(mmlu.STAGE, [*words, "--check"]).report

    assert planned(setting.folder) == setting.work / "model.mmlu.json"
    monkeypatch.setenv("MLM_WORK_DIR", "/tmp/somewhere")
    assert planned("org/name") == Path("/tmp/somewhere/org--name.mmlu.json")


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (("--fraction", 1.5), "--fraction 1.5"),
        (("--fraction", 0), "--fraction 0"),
        (("--few-shots", 3), "has 2 examples (split dev) of the subject art"),
        (("--mmlu-batch-size", 0), "--mmlu-batch-size 0"),
        (("--lower-bound", 70), "--lower-bound 70"),
        (("--mmlu-dataset", "/nowhere/mmlu"), "--mmlu-dataset /nowhere/mmlu"),
        (("--context-parallel-size", 2), "CP=2"),
        (("--tensor-model-parallel-size", 3), "TP=3"),
    ],
)
def test_usage_errors_come_before_anything_is_loaded(setting, more, expected):
    done = tools.run("mmlu.py", *flags(setting, setting.work / "x", *more), "--check", code=2)
    assert expected in done.stderr
    assert "cause:" in done.stderr
    assert "remedy:" in done.stderr


def test_the_check_imports_no_torch(setting):
    program = "import sys, mmlu; mmlu.main(); assert 'torch' not in sys.modules"
    words = map(str, flags(setting, setting.work / "x", "--check"))
    subprocess.run(
        [sys.executable, "-c", program, *words],
        cwd=tools.ROOT,
        env=tools.environment(),
        check=True,
    )


def test_a_blank_of_its_own_belongs_to_the_prompt():
    found = mmlu_asked.answer_tokens(tools.byte_tokenizer())
    tokenizer = tools.byte_tokenizer()
    assert tokenizer.decode(found.bridge) == " "
    assert [tokenizer.decode([token]) for token in found.ids] == ["A", "B", "C", "D"]


def test_letters_with_their_blank_are_compared_where_they_are_one_token():
    tokenizer = tools.byte_tokenizer()
    tokenizer.add_tokens([" A", " B", " C", " D"])
    found = mmlu_asked.answer_tokens(tokenizer)
    assert found.bridge == []
    assert [tokenizer.decode([token]) for token in found.ids] == [" A", " B", " C", " D"]


def test_a_tokenizer_that_cuts_letters_is_refused():
    tokenizer = tools.byte_tokenizer()
    tokenizer.add_tokens([": A"])
    with pytest.raises(UsageError, match="the letters are not single tokens"):
        mmlu_asked.answer_tokens(tokenizer)


def test_shared_length_is_what_all_sequences_begin_with():
    assert mmlu_asked.shared_length([[1, 2, 3, 9], [1, 2, 4], [1, 2, 3]]) == 2
    assert mmlu_asked.shared_length([[1, 2], [1, 2, 3]]) == 2
    assert mmlu_asked.shared_length([[1], [2]]) == 0
    assert mmlu_asked.shared_length([]) == 0
