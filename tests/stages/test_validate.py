"""Speculative decoding and the validate stage: greedy's tokens, honest counts, comparisons, errors.

Two targets with random weights: a Qwen3 whose head the draft shares, and a Llama 3 with scaled
rotary positions and a draft of four tokens through ``d2t``. Everything is float32. Three sets of
processes run it all (conftest.py, ``drafted``); what they found is looked at here and in
test_draft_export.py.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tools
import torch
from drafted_checkpoints import DECODED
from speculative_jobs import NEW_TOKENS, PROMPTS, STEPS

from post_training.common import files
from post_training.common.errors import UsageError
from post_training.drafts import ground_truth
from post_training.drafts.acceptance import Acceptance, AnswerPair, TokenizedPrompt, matching
from post_training.drafts.eagle3.decoding import GreedyChoice

LAYOUTS = ("TP=1", "TP=2", "PP=2")
everywhere = pytest.mark.parametrize("layout", LAYOUTS)
decoded = pytest.mark.parametrize(("model", "layout"), DECODED)


@decoded
@pytest.mark.parametrize("steps", STEPS)
def test_speculative_decoding_gives_the_tokens_of_greedy_decoding(drafted, model, layout, steps):
    found = drafted.decoded(model, layout)
    assert found[f"tokens {steps}"] == found["plain"]
    assert all(len(tokens) == NEW_TOKENS for tokens in found["plain"])


@decoded
def test_an_answer_ends_with_its_end_token(drafted, model, layout):
    found = drafted.decoded(model, layout)
    assert found["until_end 3"] == found["until_end"]
    assert min(map(len, found["until_end"])) < NEW_TOKENS


@pytest.mark.parametrize("model", ["qwen3", "llama3"])
@pytest.mark.parametrize("steps", STEPS)
def test_what_is_accepted_is_what_recomputing_everything_accepts(drafted, model, steps):
    """ModelOpt computes the draft anew over the whole sequence each time; here it has a cache,
    of which what was guessed is forgotten and replaced."""
    found = drafted.decoded(model, "TP=1")
    assert found[f"accepted {steps}"] == found[f"reference {steps}"]
    counts = {count for answer in found[f"accepted {steps}"] for count in answer}
    assert len(counts) > 1, "a draft that is always wrong or always right proves nothing"


@decoded
def test_every_layout_accepts_the_same(drafted, model, layout):
    """On a pipeline the features travel to the last stage, where the draft is."""
    one = drafted.decoded(model, "TP=1")
    for steps in STEPS:
        name = f"accepted {steps}"
        assert drafted.decoded(model, layout)[name] == one[name]


@decoded
def test_a_draft_is_measured_while_it_trains(drafted, model, layout):
    found = drafted.decoded(model, layout)
    assert found["measured 3"] == found["accepted 3"]
    assert found["still training"]


def test_acceptance_length_is_the_tokens_a_pass_of_the_target_emits():
    found = Acceptance(3, [[3, 0, 2], [1]])
    assert found.length == (4 + 1 + 3 + 2) / 4
    content = found.to_json()
    assert content["acceptance_rate"] == 6 / 12
    assert content["acceptance_rate_by_position"] == [3 / 4, 2 / 4, 1 / 4]
    assert content["histogram"] == [1, 1, 1, 1]


def test_the_interval_is_the_ratio_estimators():
    """Two answers: 6 tokens in 2 passes and 3 in 2; the ratio is 9/4, its residuals +-1.5."""
    found = Acceptance(3, [[3, 1], [1, 0]])
    half = math.tan(math.pi * 0.475) * math.sqrt(2 / 1 * 2 * 1.5**2) / 4
    assert found.interval() == pytest.approx((max(1, 2.25 - half), min(4, 2.25 + half)))
    assert Acceptance(3, [[3, 1]]).interval() is None
    assert Acceptance(1, [[0] * 9, [0] * 7]).interval() == (1, 1)
    many = Acceptance(3, [[3, 1], [1, 0]] * 40)
    assert many.interval()[1] - many.interval()[0] < 0.4


@pytest.mark.parametrize(
    ("degrees", "expected"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (5, 2.571), (9, 2.262), (30, 2.042), (79, 1.990)],
)
def test_the_interval_is_as_wide_as_students_t_of_tables(degrees, expected):
    """One verification an answer, with 50 and 51 accepted tokens by turns."""
    count = degrees + 1
    share = (count // 2) / count
    error = math.sqrt(share * (1 - share) / degrees)
    low, high = Acceptance(100, [[50 + number % 2] for number in range(count)]).interval()
    assert (high - low) / 2 == pytest.approx(expected * error, rel=3e-4)


def test_matching_is_the_common_beginning():
    assert matching([1, 2, 3], [1, 2, 4]) == 2
    assert matching([1], [1, 2]) == 1
    assert matching([], [1]) == 0


def report(drafted, name: str) -> dict:
    return json.loads((drafted.work / f"{name}.json").read_text())


@everywhere
def test_the_stage_decodes_every_prompt_twice(drafted, layout):
    content = report(drafted, f"validate {layout}")
    found = content["acceptance"]
    assert content["settings"]["steps"] == 3
    prompts = content["inputs"][-1]
    assert prompts["role"] == "prompts"
    assert prompts["sha256"] == files.sha256(Path(prompts["path"]))
    assert content["settings"]["temperature"] == 0.0
    assert found["answers"] == found["identical_answers"] == 3
    assert found["tokens"] == 3 * 8
    assert found["plain_tokens_per_second"] > 0
    assert found["speed_up"] == pytest.approx(
        found["speculative_tokens_per_second"] / found["plain_tokens_per_second"], rel=1e-3
    )
    assert set(found["categories"]) == {"writing", "math"}
    assert sum(found["histogram"]) == found["verifications"]
    assert len(found["acceptance_rate_by_position"]) == 3
    png = (drafted.work / f"validate {layout}.png").read_bytes()
    assert png.startswith(b"\x89PNG")


def test_layouts_report_the_same_acceptance(drafted):
    one = report(drafted, "validate TP=1")["acceptance"]
    for layout in ("TP=2", "PP=2"):
        other = report(drafted, f"validate {layout}")["acceptance"]
        for name in ("acceptance_length", "histogram", "categories"):
            assert other[name] == one[name]


def test_a_draft_of_a_quantized_target_is_measured(drafted):
    """Attached after FP8 quantization; what generate answers in a batch is the ground truth."""
    content = report(drafted, "fp8")
    assert content["acceptance"]["answers"] == content["acceptance"]["identical_answers"] == 3
    saved = json.loads((drafted.work / "fp8 truth.json").read_text())["answers"]
    lines = (drafted.work / "fp8 answers.jsonl").read_text().splitlines()
    generated = {row["id"]: row["messages"] for row in map(json.loads, lines)}
    for answer in saved:
        question, first, *_ = generated[answer["id"]]
        assert question["role"] == "user"
        assert first["content"] == answer["text"].removesuffix("<|endoftext|>")


def test_ground_truth_is_saved_and_found_again(drafted):
    saved = json.loads((drafted.work / "truth.json").read_text())
    assert [answer["id"] for answer in saved["answers"]] == [81, 82, 83]
    assert all(len(answer["tokens"]) == 8 for answer in saved["answers"])
    again = report(drafted, "validate PP=2")["ground_truth"]
    assert again["same_answers"] == again["compared_answers"] == 3
    assert again["differing_settings"] == []
    length = report(drafted, "validate TP=1")["acceptance"]["acceptance_length"]
    assert again["saved_acceptance_length"] == length


def test_a_ground_truth_has_prompts_of_its_own(drafted):
    """Without --prompts-path; with other steps and length, which are named."""
    content = report(drafted, "validate truth")
    assert (
        content["settings"]["prompts_sha256"]
        == (report(drafted, "validate TP=1")["settings"]["prompts_sha256"])
    )
    truth = content["ground_truth"]
    assert truth["same_answers"] == truth["compared_answers"] == 3
    notes = " ".join(truth["differing_settings"])
    assert "--steps differ from the saved ground truth's: 3 there, 1 here" in notes
    assert "--osl differ from the saved ground truth's: 8 there, 4 here" in notes
    assert "the prompts" not in notes


def measured(tokens, number=1, prompt=(1, 2), **more):
    return AnswerPair(TokenizedPrompt(number, list(prompt)), tokens, tokens, [0], 1.0, 1.0, **more)


def test_other_prompts_and_answers_are_said(tmp_path):
    answers = [measured([5, 6, 7]), measured([8, 9], 2)]
    content = {name: {} for name in ("command", "finished", "inputs", "versions", "git_commit")} | {
        "settings": ground_truth.settings(
            [each.question for each in answers],
            source="x",
            steps=3,
            osl=3,
            ignore_eos=False,
        ),
        "acceptance": {"acceptance_length": 2.0},
    }
    path = tmp_path / "truth.json"
    ground_truth.write(path, content, answers, str)
    now = [measured([5, 6, 8]), measured([8, 9], 3)]
    settings = ground_truth.settings(
        [each.question for each in now], source="x", steps=3, osl=3, ignore_eos=False
    )
    found = ground_truth.compare(ground_truth.read(path), now, settings)
    assert found["compared_answers"] == 1
    assert found["same_answers"] == 0
    assert (found["same_leading_tokens"], found["saved_tokens"]) == (2, 3)
    assert found["differing_settings"] == [
        "the prompts differ from the saved ground truth's: 1 of 2 are among the 2 saved"
    ]


def test_a_difference_is_shown_with_both_logits():
    from post_training.drafts import report as validation_report

    choice = {"token": 65, "logit": 2.5, "second": 66, "second_logit": 2.4999}
    other = {"token": 66, "logit": 2.5, "second": 65, "second_logit": 2.4998}
    each = {"id": 7, "position": 3, "plain": choice, "speculative": other, "rounding": True}
    line = validation_report.difference_line(each, lambda tokens: chr(tokens[0]))
    assert re.search(r"answer 7 differs at its token 4.*'A' with 2\.50000 before 'B'", line)
    assert "'B' with 2.50000 before 'A' with 2.49980" in line
    assert "a tie within rounding" in line


def test_of_equal_logits_the_choice_is_the_one_that_decoding_takes():
    logits = torch.zeros(300)
    logits[[200, 100, 7]] = torch.tensor([2.0, 2.0, 1.0])
    choice = GreedyChoice.of(logits)
    assert choice.token == int(logits.argmax())
    assert {choice.token, choice.second} == {100, 200}
    assert (choice.logit, choice.second_logit) == (2.0, 2.0)


def check(*words: object) -> subprocess.CompletedProcess[str]:
    """Run the stage's checks; they must refuse, and without torch."""
    program = (
        "import sys, validate\n"
        "try: validate.main()\n"
        "except SystemExit as end: assert end.code == 2, end.code\n"
        "else: sys.exit('it was accepted')\n"
        "assert 'torch' not in sys.modules\n"
    )
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, words), "--check"],
        cwd=tools.ROOT,
        env=tools.environment(),
        capture_output=True,
        text=True,
        check=True,
    )


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (("--steps", 0), "--steps 0"),
        (("--osl", 0), "--osl 0"),
        (("--lower-bound", 3), "is 1 to 2"),
        (("--ground-truth-path", "/nowhere/gt.json"), "--ground-truth-path /nowhere/gt.json"),
        (("--prompts-path", "/nowhere/x.jsonl"), "--prompts-path /nowhere/x.jsonl"),
        (("--pipeline-model-parallel-size", 5), "PP=5"),
        (("--validate-output", tools.ROOT / "Makefile" / "x"), "Makefile is a file"),
        (("--validate-output", "/tmp/new.png"), "its figure gets this name"),
        (
            ("--validate-output", "/tmp/new.json", "--save-ground-truth-path", "/tmp/new.json"),
            "is the same file",
        ),
    ],
)
def test_usage_errors_come_before_anything_is_loaded(drafted, more, expected):
    done = check("--load", drafted.checkpoint("qwen3"), *more)
    assert expected in done.stderr
    assert "cause:" in done.stderr
    assert "remedy:" in done.stderr


def test_a_figure_replaces_only_one_that_has_a_report(drafted, tmp_path):
    (tmp_path / "mine.png").write_bytes(b"a photograph")
    done = check("--load", drafted.checkpoint("qwen3"), "--validate-output", tmp_path / "mine.json")
    assert "its figure would replace" in done.stderr


def test_a_checkpoint_without_a_draft_is_refused(drafted):
    done = check("--load", drafted.work / "qwen3 plain")
    assert "it has no draft" in done.stderr
    assert "--algorithm eagle3" in done.stderr
    done = check("--pretrained-model-path", drafted.work / "qwen3 hf")
    assert "a Hugging Face folder has no draft" in done.stderr


def test_what_is_no_ground_truth_is_refused(tmp_path):
    path = tmp_path / "x.json"
    for text, cause in (
        ("[1]", "it is no JSON object"),
        ('{"answers": [{"id": 1}]}', "settings is missing"),
        ("no json", "it cannot be read as JSON"),
    ):
        path.write_text(text)
        with pytest.raises(UsageError, match=f"{cause}(?s:.*)SAVE_GT_PATH"):
            ground_truth.read(path)


def test_an_untrained_draft_is_said_to_be_of_no_use(drafted):
    """As users run it: the table, the figure's name, the warning, exit code 1 below the bound."""
    done = tools.run(
        "validate.py",
        *("--load", drafted.work / "qwen3 untrained", "--fp32", "--steps", 2, "--osl", 8),
        *("--prompts-path", drafted.work / "prompts.jsonl", "--lower-bound", 1.5),
        *("--validate-output", drafted.work / "untrained.json"),
        code=1,
    )
    assert "has not been trained yet" in done.stderr
    assert "is near 1" in done.stderr
    assert "is below 1.5" in done.stderr
    assert "acceptance length" in done.stdout
    assert "Traceback" not in done.stderr


def test_prompts_are_of_different_lengths():
    assert len({len(prompt) for prompt in PROMPTS}) == len(PROMPTS)
