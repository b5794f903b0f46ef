"""MMLU's questions from the hub, a local folder, or a file. Nothing here imports torch.

Layouts:

- the hub's: columns ``question, subject, choices, answer``; splits ``dev`` and ``test``;
- a folder with ``dev.*`` and ``test.*`` (JSONL, parquet or CSV), a clone of the hub's folder
  (``all/test-00000-of-00001.parquet``), or the authors' (``test/<subject>_test.csv`` without a
  header: question, choices, letter);
- one file with a ``subject`` column: test questions, examples from a ``dev.*`` beside ``test.*``
  or from the rows whose ``split`` is ``dev``.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from post_training.common.errors import UsageError
from post_training.data import records
from post_training.data.records import Row
from post_training.evaluation.mmlu_prompts import LETTERS, Question

OPTION = "--mmlu-dataset"
_COLUMNS = "question, subject, choices, answer"


@dataclass(frozen=True)
class Benchmark:
    """Questions by subject in the order of the file, subjects sorted by name."""

    test: dict[str, list[Question]]
    dev: dict[str, list[Question]]


def load(source: str, few_shots: int = 0, option: str = OPTION) -> Benchmark:
    """Read test questions, and the development split where ``few_shots`` needs it.

    Raises:
        UsageError: nothing to read, malformed rows, or fewer examples than ``few_shots`` in a
            subject of the test.
    """
    if records.is_local(source):
        splits = _local(Path(source).expanduser(), option)
    else:
        splits = {
            split: _questions(
                records.hub_rows(source, option, configuration="all", split=split, stream=False),
                option,
            )
            for split in (("test", "dev") if few_shots else ("test",))
        }
    benchmark = Benchmark(_by_subject(splits["test"]), _by_subject(splits.get("dev", [])))
    if not benchmark.test:
        raise UsageError(f"{option} {source}", "it holds no question", "give a test split")
    for subject in benchmark.test:
        found = len(benchmark.dev.get(subject, []))
        if found < few_shots:
            raise UsageError(
                f"--few-shots {few_shots}",
                f"{option} {source} has {found} examples (split dev) of the subject {subject}",
                f"lower --few-shots to {found}, or add a dev file with more examples",
            )
    return benchmark


def _by_subject(questions: Iterable[Question]) -> dict[str, list[Question]]:
    groups: defaultdict[str, list[Question]] = defaultdict(list)
    for question in questions:
        groups[question.subject].append(question)
    return dict(sorted(groups.items()))


def _local(path: Path, option: str) -> dict[str, list[Question]]:
    if path.is_dir():
        splits = {split: _folder_split(path, split, option) for split in ("test", "dev")}
        if not splits["test"]:
            raise UsageError(
                f"{option} {path}",
                "the folder has no test split",
                "name the file test.jsonl, test.parquet or test.csv, or test/<subject>_test.csv",
            )
        return splits
    (path,) = records.list_files(path, option)
    rows = list(records.read(path, option))
    if any("split" in row.values for row in rows):
        return {
            split: _questions([row for row in rows if row.values.get("split") == split], option)
            for split in ("test", "dev")
        }
    splits = {"test": _questions(rows, option)}
    if path.stem == "test":
        splits["dev"] = _folder_split(path.parent, "dev", option)
    return splits


def _folder_split(folder: Path, split: str, option: str) -> list[Question]:
    """Questions of ``dev`` or ``test``: the first of the layouts that is there, else none."""
    authors = sorted((folder / split).glob(f"*_{split}.csv"))
    if authors:
        return [question for path in authors for question in _authors_csv(path, split, option)]
    for place in (folder, folder / "all", folder / "data", folder / split):
        # "test.jsonl" or the hub's "test-00000-of-00001.parquet".
        names = re.compile(rf"{split}(-\d+-of-\d+)?\.(jsonl|parquet|csv)")
        candidates = sorted(place.iterdir()) if place.is_dir() else []
        paths = [path for path in candidates if names.fullmatch(path.name)]
        if paths:
            suffix = paths[0].suffix  # of the same data in two formats, one is enough
            chosen = [path for path in paths if path.suffix == suffix]
            rows = (row for path in chosen for row in records.read(path, option))
            return _questions(rows, option)
    return []


def _authors_csv(path: Path, split: str, option: str) -> Iterator[Question]:
    """``<subject>_<split>.csv``: question, choices, answer, with or without a header."""
    subject = path.stem.removesuffix(f"_{split}")
    for number, (place, fields) in enumerate(records.csv_lines(path, option)):
        if number == 0 and fields[0].lower() == "question" and fields[-1].lower() == "answer":
            continue
        if len(fields) < 4:
            raise UsageError(
                f"{option} {place}",
                f"it has {len(fields)} fields",
                "write the question, at least two choices and the answer's letter",
            )
        answer = _answer(fields[-1], len(fields) - 2, place, option)
        yield Question(subject, fields[0], tuple(fields[1:-1]), answer)


def _questions(rows: Iterable[Row], option: str) -> list[Question]:
    return [_question(row, option) for row in rows]


def _question(row: Row, option: str) -> Question:
    values = row.values
    choices = _choices(values)
    found = {**values, "choices": choices}
    columns = ("question", "subject", "answer", "choices")
    missing = [key for key in columns if found.get(key) is None]
    if missing or choices is None:
        raise UsageError(
            f"{option} {row.place}",
            f"it lacks {', '.join(missing)}; columns: {', '.join(values) or 'none'}",
            f"give the columns {_COLUMNS} (choices as a list, or choice0, choice1, ...)",
        )
    if None in choices:
        raise UsageError(
            f"{option} {row.place}",
            f"choice {choices.index(None)} is null",
            "write all choices, or leave the question out",
        )
    if not 2 <= len(choices) <= len(LETTERS):
        raise UsageError(
            f"{option} {row.place}", f"it has {len(choices)} choices", f"give 2 to {len(LETTERS)}"
        )
    answer = _answer(values["answer"], len(choices), row.place, option)
    texts = tuple(map(str, choices))
    return Question(str(values["subject"]), str(values["question"]), texts, answer)


def _choices(values: dict[str, Any]) -> tuple[str | None, ...] | None:
    """The ``choices`` list, also as JSON text, or the columns choice0, ... or A, B, ..."""
    listed = values.get("choices")
    if isinstance(listed, str):
        try:
            listed = json.loads(listed)
        except (ValueError, RecursionError):
            return None
    if isinstance(listed, list):
        return tuple(None if choice is None else str(choice) for choice in listed)
    for names in ([f"choice{i}" for i in range(len(LETTERS))], list(LETTERS)):
        listed = [values.get(name) for name in names]
        while listed and listed[-1] is None:  # columns for more choices than this question has
            listed.pop()
        if listed:
            return tuple(None if choice is None else str(choice) for choice in listed)
    return None


def _answer(value: Any, choices: int, place: str, option: str) -> int:
    """Index of the right choice from 0, 1, ... or A, B, ..."""
    text = str(value).strip()
    index = LETTERS.find(text.upper()) if len(text) == 1 and text.isalpha() else -1
    if text.isdecimal():
        index = int(text)
    if not 0 <= index < choices:
        raise UsageError(
            f"{option} {place}",
            f"the answer {value!r} is none of its {choices} choices",
            f"give 0 to {choices - 1} or A to {LETTERS[choices - 1]}",
        )
    return index
