"""Sections about scores: by subject, answers that differ from the first model's, other figures."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from post_training.reporting import measures, values
from post_training.reporting.chain import Chain, Node
from post_training.reporting.document import NOT_MEASURED, Block, Section, Table, Text, cut
from post_training.reporting.measures import percent
from post_training.reporting.records import Record

_MOST_SUBJECTS, _MOST_MODELS = 100, 8
_MOST_ANSWERS = 300
_MOST_FIGURES = 80
_DEEPEST = 4
# Stages whose reports have sections of their own.
_KNOWN = ("mmlu", "validate", "evaluate")
# Of a report, beside its figures.
_NOT_FIGURES = (
    "configuration architecture versions inputs parallel peak_memory_bytes seconds few_shots "
    "answers subjects accepted histogram"
).split()


def sections(chain: Chain) -> list[Section]:
    by_subject = [table for origin in _origins(chain) for table in _by_subject(chain, origin)]
    flipped = [block for origin in _origins(chain) for block in _flipped(chain, origin)]
    figures = _other_figures(chain)
    found = [
        Section("Scores by subject", by_subject),
        Section("Answers that differ", flipped),
        Section("Further measurements", figures),
    ]
    return [section for section in found if section.blocks]


def _origins(chain: Chain) -> list[Node]:
    return [node for node in chain.outputs if node.origin is node]


@dataclass(frozen=True)
class _Sheet:
    """What a model answered: ``content`` has its accuracies by subject and its letters."""

    node: Node
    record: Record
    content: Mapping[str, Any]


def _sheets(node: Node) -> list[_Sheet]:
    """Of a model, the newest first."""
    found = []
    for records, role in ((node.reports, "model"), (node.references, "reference")):
        for record in reversed(records):
            content = values.mapping(record.content, "measures", "mmlu", role)
            if role == "model" and values.mapping(record.content, "subjects"):
                content = record.content
            if values.mapping(content, "subjects"):
                found.append(_Sheet(node, record, content))
    return found


def _comparable(chain: Chain, origin: Node) -> list[_Sheet]:
    """Sheets of a line's models with the same questions, the first model's before the others."""
    nodes = [node for node in chain.outputs if node.origin is origin and node is not origin]
    most: list[_Sheet] = []
    for first in _sheets(origin):
        found = [first]
        for node in nodes:
            same = (s for s in _sheets(node) if measures.asked_the_same(first.record, s.record))
            found += itertools.islice(same, 1)
        most = found if len(found) > len(most) else most
    return most[:_MOST_MODELS]


def _by_subject(chain: Chain, origin: Node) -> Iterator[Block]:
    compared = _comparable(chain, origin)
    subjects = list(values.mapping(compared[0].content, "subjects")) if compared else []
    rows = []
    for subject in subjects:
        accuracies = [
            values.number(each.content, "subjects", subject, "accuracy") for each in compared
        ]
        first = accuracies[0]
        total = values.number(compared[0].content, "subjects", subject, "total")
        row = [subject, NOT_MEASURED if total is None else f"{total:.0f}"]
        for number, accuracy in enumerate(accuracies):
            cell = NOT_MEASURED if accuracy is None else percent(accuracy)
            if number and accuracy is not None and first is not None:
                cell += f" ({measures.signed(accuracy - first)})"
            row.append(cell)
        rows.append(row)
    names = [each.node.name for each in compared]
    caption = f"Correct answers in %; in brackets the difference from {origin.name} in points."
    if rows:
        yield Table(caption, ["subject", "questions", *names], cut(rows, _MOST_SUBJECTS))


def _flipped(chain: Chain, origin: Node) -> Iterator[Block]:
    """Answers of two models to the same questions, of which reports hold the letters."""
    compared = _comparable(chain, origin)
    rows, listed = [], []
    for sheet in compared[1:]:
        node = sheet.node
        before = values.mapping(compared[0].content, "answers")
        after = values.mapping(sheet.content, "answers")
        if not before or not _same_questions(before, after):
            continue
        differing = [
            (subject, number, one, other)
            for subject in before
            for number, (one, other) in enumerate(
                zip(before[subject], after[subject], strict=True), start=1
            )
            if one != other
        ]
        total = sum(map(len, before.values()))
        share = 100 * len(differing) / max(1, total)
        rows.append([node.name, f"{len(differing)}", f"{total}", f"{share:.1f}"])
        cells = [[subject, str(number), *letters] for subject, number, *letters in differing]
        columns = ["subject", "question", origin.name, node.name]
        if cells:
            caption = f"Answers of {node.name} that are not those of {origin.name}"
            listed.append(Table(caption, columns, cut(cells, _MOST_ANSWERS), folded=True))
    if rows:
        caption = (
            f"Questions that were answered otherwise than by {origin.name}, rightly or wrongly: a "
            "score may stay the same while answers change."
        )
        yield Table(caption, ["model", "differ", "of", "%"], rows)
        yield from listed


def _same_questions(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    lengths = [
        {name: len(letters) for name, letters in each.items() if isinstance(letters, str)}
        for each in (before, after)
    ]
    return lengths[0] == lengths[1] and len(lengths[0]) == len(before)


def _other_figures(chain: Chain) -> list[Block]:
    """The numbers of reports of other stages, under the names that they have there."""
    rows = []
    for node in chain.nodes:
        for record in node.reports:
            if record.stage not in _KNOWN:
                rows += [[node.name, record.stage, *figure] for figure in _figures(record.content)]
    found: list[Block] = []
    if rows:
        caption = "Figures of reports, under the names that they have there"
        columns = ["model", "stage", "figure", "value"]
        found.append(Table(caption, columns, cut(rows, _MOST_FIGURES), folded=len(rows) > 12))
    outdated = [
        f"{record.path.name} ({record.stage} of {node.name})"
        for node in chain.nodes
        for record in node.outdated
    ]
    if outdated:
        said = "Left out, as the model was made again after they were measured"
        found.append(Text(f"{said}: {', '.join(outdated)}."))
    if chain.loose:
        named = ", ".join(f"{each.path.name} ({each.stage})" for each in chain.loose[:20])
        found.append(Text(f"Reports about models that are not here: {named}."))
    return found


def _figures(content: Mapping[str, Any], before: str = "", depth: int = 0) -> Iterator[list[str]]:
    for name, value in content.items():
        if name in _NOT_FIGURES and not depth:
            continue
        number = values.number(value)
        if number is not None:
            yield [f"{before}{name}", measures.significant(number)]
        elif isinstance(value, Mapping) and depth < _DEEPEST:
            yield from _figures(value, f"{before}{name}.", depth + 1)
        elif (spread := values.interval(value)) is not None and "interval" in name:
            shown = " to ".join(map(measures.significant, spread))
            yield [f"{before}{name}", shown]
