"""Which measurements may stand side by side: those of the same questions, or of the same text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from post_training.reporting import values
from post_training.reporting.records import Record

MMLU = ("measures", "mmlu")  # of a report of evaluations


class _OfRecord(Protocol):
    @property
    def record(self) -> Record: ...


def questions(record: Record) -> str:
    """What tells one set of questions from another, wherever it lies."""
    content = values.mapping(record.content, *MMLU, "model") or record.content
    how = [values.number(content, name) for name in ("total", "few_shots")]
    stage = "mmlu" if record.stage == "evaluate" else record.stage  # both ask alike
    return repr((stage, _inputs(record, "questions"), how, of_weights_alone(record)))


def text(record: Record) -> str:
    """The same of a text."""
    read = values.mapping(record.content, "text")
    how = [values.number(read, name) for name in ("window", "stride", "tokens")]
    return repr((record.stage, _inputs(record, "text"), how, of_weights_alone(record)))


def distributions(record: Record) -> str:
    """The same of a text and the model whose predictions others are compared with."""
    return repr((text(record), _inputs(record, "reference")))


def _inputs(record: Record, role: str) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in each.items() if name != "path" or len(each) == 2}
        for each in record.inputs
        if each.get("role") == role
    ]


def of_weights_alone(record: Record) -> bool:
    """Whether inputs, keys and values were left unrounded, which an engine would round."""
    said = (
        values.mapping(record.content, "configuration"),
        values.mapping(record.content, "notes", "model"),  # of an exported folder
    )
    return any(each.get("weights_only") is True for each in said)


def measured[N, M: _OfRecord](
    nodes: Sequence[N], quantity: Callable[[N], M | None], key: Callable[[Record], str]
) -> list[tuple[N, M, bool]]:
    """A quantity of each node that has it, and whether it was measured as most of them were.

    As the first, where no way has more.
    """
    found = [(node, quantity(node)) for node in nodes]
    known = [(node, each) for node, each in found if each is not None]
    keys = [key(each.record) for _, each in known]
    chosen = max(keys, key=keys.count, default="")
    return [(node, each, own == chosen) for (node, each), own in zip(known, keys, strict=True)]
