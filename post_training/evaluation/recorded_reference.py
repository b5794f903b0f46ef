"""A reference that was evaluated before: its report, in which every answer is. No torch.

Where the model is asked elsewhere (a server), the one before need not be loaded for the comparison.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from post_training.common import files, manifest
from post_training.common.errors import UsageError
from post_training.evaluation import gsm8k, mmlu_measure
from post_training.evaluation.answers import Answer, Measure

logger = logging.getLogger("post_training")

_OPTION = "--reference"
_SAME = ("few_shots", "max_new_tokens")  # details of a measure that say what was asked
_ROLES = ("questions", "problems", "solved problems")


def is_report(location: str) -> bool:
    """Whether a reference is a report of evaluate.py, not a model."""
    return location.endswith(".json") and Path(location).is_file()


def read(location: str, questions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The report of an evaluation of the same ``questions``, as a report records them.

    Raises:
        UsageError: if it is none, or of other questions.
    """
    what, remedy = f"{_OPTION} {location}", "evaluate the model before with these questions"
    content: dict[str, Any] = files.read_json_object(Path(location), "report", remedy)
    if content.get("stage") != "evaluate" or not isinstance(content.get("measures"), dict):
        raise UsageError(what, "it is no report of evaluate.sh", remedy)
    asked = [each for each in questions if each["role"] in _ROLES]
    theirs = [each for each in content.get("inputs", []) if each.get("role") in _ROLES]
    if _identities(asked) != _identities(theirs):
        raise UsageError(what, "it was made with other questions", remedy)
    return content


def _identities(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """By content, wherever the files were; a name of the hub as it is."""
    found = []
    for entry in entries:
        hashes = {name: value for name, value in entry.items() if name.endswith("sha256")}
        found.append(json.dumps([entry["role"], hashes or entry["path"]], sort_keys=True))
    return found


def entry(location: str) -> dict[str, Any]:
    """As a report records its inputs."""
    return manifest.describe_input("reference", location)


def add_text(text: dict[str, Any], read: Sequence[Mapping[str, Any]], content: Any) -> None:
    """Put the recorded perplexity beside a model's, where it is of the same tokens.

    There is no interval: the report has no figures of single windows.

    Args:
        text: the entry of the model, which is changed.
        read: the files of the text, as a report records them.
        content: the reference's report.
    """
    recorded = content.get("text")
    theirs = [each for each in content.get("inputs", []) if each.get("role") == "text"]
    names = ("window", "stride", "tokens")
    same = isinstance(recorded, Mapping) and _identities(read) == _identities(theirs)
    if not same or any(recorded.get(name) != text[name] for name in names):
        logger.warning("the reference's perplexity is of another text or other windows: left out")
        return
    loss = text["model"]["loss"] - recorded["model"]["loss"]
    text["reference"] = recorded["model"]
    text["difference"] = {"loss": loss, "interval_95": None, "perplexity_ratio": math.exp(loss)}


def measures(content: Mapping[str, Any], mine: Sequence[Measure], location: str) -> list[Measure]:
    """The recorded answers to the questions that were asked of another model just now.

    Raises:
        UsageError: if they were asked otherwise, or not all of them.
    """
    return [_measure(content["measures"].get(each.name), each, location) for each in mine]


def _measure(recorded: Any, mine: Measure, location: str) -> Measure:
    what = f"{_OPTION} {location}"
    details = recorded.get("model") if isinstance(recorded, Mapping) else None
    if not isinstance(details, Mapping):
        raise UsageError(what, f"it has no {mine.name}", "evaluate the model before with it")
    for name in _SAME:
        if details.get(name) != mine.details.get(name):
            cause = f"{mine.name} had {name} {details.get(name)}, and has {mine.details.get(name)}"
            raise UsageError(what, cause, "ask both in the same way")
    given = _given(details.get("answers"), mine)
    if len(given) != len(mine.answers):
        cause = f"{mine.name} had {len(given)} questions, and has {len(mine.answers)}"
        raise UsageError(what, cause, "ask both the same questions (--fraction, --gsm8k-limit)")
    found = [
        Answer(each.id, each.question, each.expected, said, _is_right(mine, said, each.expected))
        for each, said in zip(mine.answers, given, strict=True)
    ]
    kept = {name: value for name, value in details.items() if name in mine.details}
    return Measure(mine.name, found, kept)


def _given(answers: Any, mine: Measure) -> list[str]:
    """The recorded answers in the order of the questions."""
    if not isinstance(answers, Mapping):
        return [str(each) for each in answers or ()]
    subjects = dict.fromkeys(each.id.rpartition("/")[0] for each in mine.answers)
    return [letter for subject in subjects for letter in str(answers.get(subject, ""))]


def _is_right(measure: Measure, given: str, expected: str) -> bool:
    is_letter = measure.name == mmlu_measure.NAME
    return given == expected if is_letter else gsm8k.is_right(given, expected)
