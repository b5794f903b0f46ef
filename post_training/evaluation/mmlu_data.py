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

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from post_training.common import inputs, json_text
from post_training.common.errors import UsageError
from post_training.data import records
from post_training.data.records import Row
from post_training.evaluation.mmlu_prompts import LETTERS, Question

logger = logging.getLogger("post_training")
OPTION = "--mmlu-dataset"
_COLUMNS = ("question", "subject", "choices", "answer")


@dataclass(frozen=True)
class Benchmark:
    """Questions by subject in the order of the file, subjects sorted by name."""

    test: dict[str, list[Question]]
    dev: dict[str, list[Question]]


def load(source: str, few_shots: int = 0) -> Benchmark:
    """Read test questions, and the development split where ``few_shots`` needs it.

    Raises:
        UsageError: nothing to read, malformed rows, or fewer examples than ``few_shots`` in a
            subject of the test.
    """
    rows: Mapping[str, Iterable[Row]]
    if records.is_local(source):
        rows = _local(inputs.expanded(source))
    else:
        rows = {
            split: records.hub_rows(source, OPTION, configuration="all", split=split, stream=False)
            for split in (("test", "dev") if few_shots else ("test",))
        }
    benchmark = Benchmark(_by_subject(rows["test"]), _by_subject(rows.get("dev", [])))
    if not benchmark.test:
        raise UsageError(f"{OPTION} {source}", "it holds no question", "give a test split")
    for subject in benchmark.test:
        found = len(benchmark.dev.get(subject, []))
        if found < few_shots:
            raise UsageError(
                f"--few-shots {few_shots}",
                f"{OPTION} {source} has {found} examples (split dev) of the subject {subject}",
                f"lower --few-shots to {found}, or add a dev file with more examples",
            )
    return benchmark


def _by_subject(rows: Iterable[Row]) -> dict[str, list[Question]]:
    groups: defaultdict[str, list[Question]] = defaultdict(list)
    for question in map(_question, rows):
        groups[question.subject].append(question)
    return dict(sorted(groups.items()))


def _local(path: Path) -> dict[str, list[Row]]:
    if path.is_dir():
        splits = {split: _folder_split(path, split) for split in ("test", "dev")}
        if not splits["test"]:
            raise UsageError(
                f"{OPTION} {path}",
                "the folder has no test split",
                "name the file test.jsonl, test.parquet or test.csv, or test/<subject>_test.csv",
            )
        return splits
    (path,) = records.list_files(path, OPTION)
    rows = list(records.read(path, OPTION))
    if any("split" in row.values for row in rows):
        others = Counter(str(row.values.get("split")) for row in rows)
        if unused := {name: n for name, n in others.items() if name not in ("test", "dev")}:
            shown = ", ".join(f"{name} ({count:,} rows)" for name, count in unused.items())
            logger.info("%s: splits that are not used: %s", OPTION, shown)
        return {
            split: [row for row in rows if row.values.get("split") == split]
            for split in ("test", "dev")
        }
    return {"test": rows, "dev": _folder_split(path.parent, "dev") if path.stem == "test" else []}


def _folder_split(folder: Path, split: str) -> list[Row]:
    """Rows of ``dev`` or ``test``: the first of the layouts that is there, else none."""
    authors = sorted((folder / split).glob(f"*_{split}.csv"))
    if authors:
        return [row for path in authors for row in _authors_csv(path, split)]
    for place in (folder, folder / "all", folder / "data", folder / split):
        # "test.jsonl" or the hub's "test-00000-of-00001.parquet".
        names = re.compile(rf"{split}(-\d+-of-\d+)?\.(jsonl|parquet|csv)")
        candidates = sorted(place.iterdir()) if place.is_dir() else []
        paths = [path for path in candidates if names.fullmatch(path.name)]
        if paths:
            suffix = paths[0].suffix  # of the same data in two formats, one is enough
            chosen = [path for path in paths if path.suffix == suffix]
            parts = re.search(r"-of-(\d+)$", chosen[0].stem)
            if parts and int(parts[1]) != len(chosen):
                raise UsageError(
                    f"{OPTION} {place}",
                    f"it has {len(chosen)} of the {int(parts[1])} files of its split {split}",
                    "copy or download the others",
                )
            return [row for path in chosen for row in records.read(path, OPTION)]
    return []


def _authors_csv(path: Path, split: str) -> Iterator[Row]:
    """``<subject>_<split>.csv``: question, choices, answer, with or without a header."""
    subject = path.stem.removesuffix(f"_{split}")
    for number, (place, fields) in enumerate(records.csv_lines(path, OPTION)):
        if number == 0 and fields[0].lower() == "question" and fields[-1].lower() == "answer":
            continue
        values = {"question": fields[0], "choices": fields[1:-1], "answer": fields[-1]}
        yield Row(place, {"subject": subject, **values})


def _question(row: Row) -> Question:
    what, choices = f"{OPTION} {row.place}", _choices(row.values)
    values = {**row.values, "choices": choices}
    missing = [name for name in _COLUMNS if values.get(name) is None]
    if missing or choices is None:
        raise UsageError(
            what,
            f"it lacks {', '.join(missing)}; columns: {', '.join(row.values) or 'none'}",
            f"give the columns {', '.join(_COLUMNS)} (choices as a list, or choice0, choice1, ...)",
        )
    if None in choices:
        cause = f"choice {choices.index(None)} is null"
        raise UsageError(what, cause, "write all choices, or leave the question out")
    count = len(choices)
    if not 2 <= count <= len(LETTERS):
        raise UsageError(what, f"it has {count} choices", f"give 2 to {len(LETTERS)}")
    answer = str(values["answer"]).strip()
    index = LETTERS.find(answer.upper()) if len(answer) == 1 and answer.isalpha() else -1
    if answer.isdecimal():
        index = int(answer)
    if not 0 <= index < count:
        raise UsageError(
            what,
            f"the answer {values['answer']!r} is none of its {count} choices",
            f"give 0 to {count - 1} or A to {LETTERS[count - 1]}",
        )
    texts = tuple(map(str, choices))
    return Question(str(values["subject"]), str(values["question"]), texts, index)


def _choices(values: dict[str, Any]) -> list[Any] | None:
    """The ``choices`` list, also as JSON text, or the columns choice0, ... or A, B, ..."""
    listed = values.get("choices")
    if isinstance(listed, str):
        try:
            listed = json_text.parse(listed)
        except (ValueError, RecursionError):
            return None
    if isinstance(listed, list):
        return listed
    for names in ([f"choice{i}" for i in range(len(LETTERS))], LETTERS):
        listed = [values.get(name) for name in names]
        # Columns for more choices than this question has; a CSV file's are empty.
        while listed and listed[-1] in (None, ""):
            listed.pop()
        if listed:
            return listed
    return None
