"""The parts of an evaluation that need no model: windows, statistics, bounds, files beside it."""

from __future__ import annotations

import math
import random

import pytest

from post_training.common.errors import UsageError
from post_training.data import text_windows
from post_training.evaluation import (
    evaluation_report,
    gates,
    harness_options,
    intervals,
    recorded_reference,
)
from post_training.evaluation.answers import Answer, Measure, paired
from post_training.evaluation.gates import GateOptions
from post_training.evaluation.intervals import Paired


@pytest.mark.parametrize(("length", "stride"), [(8, 8), (8, 3), (8, 1), (100, 100)])
def test_windows_score_a_token_once_if_one_stands_before_it(length, stride):
    tokens = list(range(50))
    scored = [
        token
        for window in text_windows.windows(tokens, length, stride)
        for token in window.tokens[-window.scored :]
    ]
    first = range(0, 50, stride) if stride == length else [0]
    assert scored == [token for token in tokens if token not in first]


def test_a_document_of_one_token_has_nothing_to_predict():
    assert list(text_windows.windows([1], 8, 8)) == []
    assert [w.scored for w in text_windows.windows(range(9), 8, 8)] == [7]


@pytest.mark.parametrize(
    ("gained", "lost", "p"),
    [
        (1, 9, 2 * (1 + 10) / 2**10),
        (9, 1, 2 * (1 + 10) / 2**10),
        (5, 5, 1.0),
        (0, 0, 1.0),
        (0, 6, 2 / 2**6),
    ],
)
def test_mcnemars_p_is_that_of_the_binomial(gained, lost, p):
    assert Paired(100, gained, lost).mcnemar() == pytest.approx(p, rel=1e-12)


def test_mcnemars_p_of_many_questions_is_near_the_normal_approximation():
    gained, lost = 5000, 5200
    z = (abs(gained - lost) - 1) / math.sqrt(gained + lost)
    assert Paired(14042, gained, lost).mcnemar() == pytest.approx(math.erfc(z / 2**0.5), rel=1e-3)
    assert Paired(10**5, 0, 10**5).mcnemar() == 0.0


def test_the_interval_of_a_difference_covers_it_in_95_of_100_samples():
    generator = random.Random(1)
    covered, gain, loss, questions, samples = 0, 0.10, 0.16, 150, 2000
    for _ in range(samples):
        draws = [generator.random() for _ in range(questions)]
        gained, lost = sum(d < gain for d in draws), sum(gain <= d < gain + loss for d in draws)
        low, high = Paired(questions, gained, lost).interval()
        covered += low <= gain - loss <= high
    assert 0.93 < covered / samples < 0.97


def test_the_bootstrap_over_documents_covers_the_mean_in_95_of_100_samples():
    """Tokens of a document share its own mean, so a count over tokens would be too sure."""
    generator = random.Random(2)
    covered, samples = 0, 50
    for _ in range(samples):
        weights = [generator.randint(5, 60) for _ in range(40)]
        sums = [weight * generator.gauss(2.0, 0.5) for weight in weights]
        ((low, high),) = intervals.of_means([sums], weights)
        covered += low <= 2.0 <= high
    assert covered / samples > 0.85  # over tokens it would be about 0.3
    assert intervals.of_means([[1.0]], [3.0]) == [None]


def content(accuracy, reference, kl):
    """A report with one measure."""
    entry = {
        "model": {"accuracy": accuracy},
        "difference": {"difference": accuracy - reference},
    }
    return {"measures": {"mmlu": entry}, "text": {"kl": {"mean": kl}}}


@pytest.mark.parametrize(
    ("options", "broken"),
    [
        ({"lower_bound": ("0.5",)}, 0),
        ({"lower_bound": ("0.7",)}, 1),
        ({"lower_bound": ("0.7", "mmlu=0.5")}, 0),
        ({"max_drop": ("0.11",), "max_kl": 0.02}, 0),
        ({"max_drop": ("0.09",), "max_kl": 0.01}, 2),
        ({"max_kl": 0.0}, 1),
    ],
)
def test_bounds_are_compared_with_the_figures(options, broken):
    found = gates.broken(GateOptions(**options), content(0.6, 0.7, 0.015))
    assert len(found) == broken


@pytest.mark.parametrize("words", [("0.5", "0.9"), ("mmlu=0.5", "0.6", "mmlu=0.9")])
def test_two_bounds_of_one_measure_are_refused(words):
    with pytest.raises(UsageError, match="second bound"):
        gates.bounds("--lower-bound", words)


def test_a_divergence_that_is_no_number_breaks_its_bound():
    assert gates.broken(GateOptions(max_kl=0.1), content(0.6, 0.6, math.nan))


def test_flips_replace_no_file_without_a_report(tmp_path):
    (tmp_path / "r.flips.jsonl").write_text("mine")
    with pytest.raises(UsageError, match="would replace"):
        evaluation_report.check_target(tmp_path / "r.json", "evaluate")


def test_tasks_that_leave_no_room_for_the_question_are_refused():
    assert harness_options.room(1024, 256) == 768
    for new in (1024, 2048):  # of whose prompts none or the end would be kept
        with pytest.raises(UsageError, match=f"answers of {new:,} tokens"):
            harness_options.room(1024, new)
    harness_options.require_room(1024, 1024)
    with pytest.raises(UsageError, match="an answer of 1,025 tokens"):
        harness_options.require_room(1024, 1025)


def test_a_recorded_reference_is_judged_as_it_was():
    """GSM8K's answers, which are a list; numbers may be spelled otherwise than the right ones."""
    expected = ["1,200", "7", "3"]
    mine = [Answer(str(i), "q", each, "7", each == "7") for i, each in enumerate(expected)]
    details = {"few_shots": 2, "max_new_tokens": 9, "answers": ["7"] * 3}
    of_reference = {"few_shots": 2, "max_new_tokens": 9, "answers": ["$1200", "8", "3."]}
    content = {"measures": {"gsm8k_strict": {"model": of_reference}}}
    asked = [Measure("gsm8k_strict", mine, details)]
    (found,) = recorded_reference.measures(content, asked, "before.json")
    assert [each.right for each in found.answers] == [True, False, True]
    assert paired(asked[0], found).difference == pytest.approx(-1 / 3)
    of_reference["answers"] = ["8"]
    with pytest.raises(UsageError, match="had 1 questions, and has 3"):
        recorded_reference.measures(content, asked, "before.json")
    with pytest.raises(UsageError, match="it has no mmlu"):
        recorded_reference.measures(content, [Measure("mmlu", [], {})], "before.json")
