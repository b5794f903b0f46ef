"""What a measurement of a draft keeps for later ones, and the comparison with it. No torch.

A *ground truth* file holds prompts, the model's own greedy answers, the settings and what was
accepted. Figures compare only where prompts, steps, length and temperature are the same: where they
are not, that is said.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from post_training.common import files, forms, outputs
from post_training.common.errors import UsageError
from post_training.drafts.acceptance import AnswerPair, TokenizedPrompt, matching

# A setting that must be the same, and what to call it.
_COMPARED = {
    "prompts_sha256": "the prompts",
    "steps": "--steps",
    "osl": "--osl",
    "ignore_eos": "--ignore-eos",
    "temperature": "the temperature",
}


@dataclass(frozen=True)
class GroundTruth:
    """What an earlier measurement kept: its prompts, :func:`settings` and figures.

    ``answers`` has the greedy answer by the row's identity and prompt, ``texts`` its text.
    """

    settings: dict[str, Any]
    answers: dict[str, list[int]]
    acceptance_length: float | None
    questions: list[TokenizedPrompt]
    texts: dict[str, str]


class _Settings(TypedDict, total=False):
    prompts: str
    prompts_sha256: str
    steps: int
    osl: int
    ignore_eos: bool
    temperature: float


class _Acceptance(TypedDict, total=False):
    acceptance_length: float | None


class _Answer(TypedDict):
    id: str | int
    prompt: list[int]
    category: NotRequired[Any]
    tokens: list[int]
    text: NotRequired[str]


class _Form(TypedDict):
    settings: _Settings
    acceptance: _Acceptance
    answers: list[_Answer]


def settings(
    questions: Iterable[TokenizedPrompt], source: str, steps: int, osl: int, ignore_eos: bool
) -> dict[str, Any]:
    """What must be the same for two measurements to compare."""
    keys = "".join(map(key, questions))
    return {
        "prompts": source,
        "prompts_sha256": hashlib.sha256(keys.encode()).hexdigest(),
        "steps": steps,
        "osl": osl,
        "ignore_eos": ignore_eos,
        "temperature": 0.0,  # decoding is greedy here
    }


def write(
    path: Path,
    content: Mapping[str, Any],
    pairs: Sequence[AnswerPair],
    decode: Callable[[Sequence[int]], str],
) -> None:
    """Keep the greedy answers and the settings in ``content`` for later comparisons.

    Texts are there for people and engines, special tokens included; comparisons read the tokens.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    answers = [
        {
            **asdict(each.question),
            "tokens": each.plain,
            "prompt_text": decode(each.question.prompt),
            "text": decode(each.plain),
        }
        for each in pairs
    ]
    names = ("command", "finished", "inputs", "settings", "acceptance", "versions", "git_commit")
    files.write_json(path, {**{name: content[name] for name in names}, "answers": answers})


def check_target(path: Path, *, overwrite: bool) -> None:
    """Raise UsageError unless :func:`write` may write ``path``: with --overwrite over its like."""
    option = f"--save-ground-truth-path {path}"
    if path.exists():
        if not overwrite:
            raise UsageError(option, "it exists", "name another file, or give --overwrite")
        try:
            read(path)
        except UsageError as error:
            cause = "it exists, and is no ground truth of validate.sh"
            raise UsageError(option, cause, "name another file") from error
    outputs.writable(path, option)


def read(path: Path) -> GroundTruth:
    """What :func:`write` kept.

    Raises:
        UsageError: if it is not there, or not such a file.
    """
    option = "--ground-truth-path"
    if not path.exists():
        remedy = "make it first: SAVE_GT_PATH=... bash validate.sh <conf>"
        raise UsageError(f"{option} {path}", "there is no such file", remedy)
    remedy = "name a file that SAVE_GT_PATH=... bash validate.sh <conf> wrote"
    content: _Form = forms.read_json(path, _Form, option, remedy)
    questions = [
        TokenizedPrompt(row["id"], row["prompt"], row.get("category")) for row in content["answers"]
    ]
    keyed = [(key(each), row) for each, row in zip(questions, content["answers"], strict=True)]
    return GroundTruth(
        dict(content["settings"]),
        {name: row["tokens"] for name, row in keyed},
        content["acceptance"].get("acceptance_length"),
        questions,
        {name: row["text"] for name, row in keyed if "text" in row},
    )


def compare(
    saved: GroundTruth, pairs: Sequence[AnswerPair], now: Mapping[str, Any]
) -> dict[str, Any]:
    """This run's greedy answers and settings against the saved ones, for the report.

    ``differing_settings`` has a sentence for each setting that differs.
    """
    both = [
        (saved.answers[key(each.question)], each.plain)
        for each in pairs
        if key(each.question) in saved.answers
    ]
    notes = []
    for name, meaning in _COMPARED.items():
        was, value = saved.settings.get(name), now.get(name)
        shown = f"{was} there, {value} here"
        if name == "prompts_sha256":
            shown = f"{len(both)} of {len(pairs)} are among the {len(saved.answers)} saved"
        if was != value:
            notes.append(f"{meaning} differ from the saved ground truth's: {shown}")
    # An answer that another --osl cut is not a different answer.
    shortest = min(saved.settings.get("osl") or 0, now["osl"])
    compared = [(old[:shortest], new[:shortest]) for old, new in both]
    return {
        "compared_answers": len(compared),
        "same_answers": sum(old == new for old, new in compared),
        "same_leading_tokens": sum(matching(old, new) for old, new in compared),
        "saved_tokens": sum(len(old) for old, _ in compared),
        "saved_acceptance_length": saved.acceptance_length,
        "differing_settings": notes,
    }


def key(question: TokenizedPrompt) -> str:
    """What a question is known by."""
    return json.dumps([question.id, question.prompt])
