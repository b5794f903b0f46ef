"""What was measured of a model, from its records: nothing is estimated, and what is absent is None.

Reports of stages that this version does not know are searched for the names of quantities.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from post_training.common.report import number_of_bytes
from post_training.reporting import comparable, values
from post_training.reporting.chain import Node
from post_training.reporting.document import MINUS, NOT_MEASURED
from post_training.reporting.records import Record

_PLAIN_BITS = {"bf16": 16.0, "fp16": 16.0, "fp32": 32.0}
_DEEPEST = 4
# Names of a quantity in reports; the first that is there counts.
_KL = ("kl_divergence", "kl", "mean_kl")
_PERPLEXITY = ("perplexity",)


@dataclass(frozen=True)
class Measured:
    """A value and its 95 % interval, where there is one, from a record."""

    value: float
    interval: tuple[float, float] | None
    record: Record

    def shown(self, write: Callable[[float], str], unit: str = "") -> str:
        """``94.5 % (90.0 to 97.1)``."""
        text = f"{write(self.value)}{unit}"
        if self.interval is None:
            return text
        low, high = map(write, self.interval)
        return f"{text} ({low} to {high})"


def score(node: Node) -> Measured | None:
    """Accuracy on multiple-choice questions, 0 to 1: of the newest report that has one."""
    return _newest(
        node, {"": [()], "model": [comparable.MMLU], "reference": [comparable.MMLU]}, "accuracy"
    )


def _newest(node: Node, places: Mapping[str, list[tuple[str, ...]]], name: str) -> Measured | None:
    """A quantity with its interval, where reports have it.

    Args:
        places: by the role that the node has in a report, objects that may have it.
    """
    for records, roles in ((node.reports, ("", "model")), (node.references, ("reference",))):
        for record in _newest_first(records):
            for role in roles:
                for place in places.get(role, ()):
                    path = (*place, role) if role else place
                    value = values.number(record.content, *path, name)
                    if value is not None:
                        spread = values.interval(record.content, *path, "interval_95")
                        return Measured(value, spread, record)
    return None


def _newest_first(records: Sequence[Record]) -> list[Record]:
    """Those of weights alone last: an engine rounds more."""
    newest = list(reversed(records))
    return sorted(newest, key=comparable.of_weights_alone)


def acceptance(node: Node) -> Measured | None:
    """Tokens that a pass of the model emits with its draft."""
    for record in reversed(node.reports):
        found = values.mapping(record.content, "acceptance")
        length = values.number(found, "acceptance_length")
        if length is not None:
            return Measured(length, values.interval(found, "interval_95"), record)
    return None


def kl_divergence(node: Node) -> Measured | None:
    """Of the next token's distribution, in nats, from that of a reference."""
    return _named(node, _KL)


def perplexity(node: Node) -> Measured | None:
    """Of text, as the newest report has it."""
    found = _newest(node, {"model": [("text",)], "reference": [("text",)]}, "perplexity")
    return found or _named(node, _PERPLEXITY)


def speed(node: Node) -> str:
    """Tokens a second of decoding, plain and with the draft."""
    for record in reversed(node.reports):
        found = values.mapping(record.content, "acceptance")
        plain = values.number(found, "plain_tokens_per_second")
        drafted = values.number(found, "speculative_tokens_per_second")
        if plain is not None and drafted is not None:
            return f"{plain:,.0f} tokens/s, with the draft {drafted:,.0f}"
    return NOT_MEASURED


def _named(node: Node, names: tuple[str, ...]) -> Measured | None:
    """The first of the quantities in the newest report: a number, or an object with its value."""
    for record in _newest_first(node.reports):
        for name in names:
            for parent in _objects(record.content, _DEEPEST):
                value, spread = values.number(parent, name), parent
                for inner in ("value", "mean", name):
                    if value is None:
                        value = values.number(parent, name, inner)
                        spread = values.mapping(parent, name)
                if value is not None:
                    own = values.interval(spread, f"{name}_interval_95")
                    own = own or values.interval(spread, "interval_95")
                    inside = own is not None and own[0] <= value <= own[1]
                    return Measured(value, own if inside else None, record)
    return None


def _objects(content: Any, deepest: int) -> Iterator[Mapping[str, Any]]:
    """The object and those in it, nearest first; not what was configured."""
    level = [content] if isinstance(content, Mapping) else []
    for _ in range(deepest):
        yield from level
        level = [
            each
            for parent in level
            for name, each in parent.items()
            if isinstance(each, Mapping) and name not in ("configuration", "architecture")
        ]


def parameters(node: Node) -> int | None:
    """As recorded, or as of what it was made from with the same architecture."""
    architecture = node.content.get("architecture")
    current: Node | None = node
    while current is not None and current.content.get("architecture") == architecture:
        recorded = (
            values.number(current.metrics, "parameters"),
            values.number(current.metrics, "after", "parameters"),
            values.number(current.metrics, "coverage", "parameters"),
        )
        found = next((each for each in recorded if each is not None), None)
        if found is not None:
            return int(found)
        current = current.parent
    return None


def bits_per_weight(node: Node) -> float | None:
    """Stored bits of a parameter, scales included."""
    metrics = node.metrics
    for path in (("bits_per_weight",), ("coverage", "bits_per_weight")):
        if (bits := values.number(metrics, *path)) is not None:
            return bits
    parent = node.parent
    if node.content.get("quantization"):  # trained on, or with a draft attached
        return bits_per_weight(parent) if parent is not None else None
    named = values.text(metrics, "dtype")
    given = values.mapping(node.content, "configuration")
    stated = next((kind for kind in _PLAIN_BITS if given.get(kind) is True), named)
    if stated in _PLAIN_BITS:
        return _PLAIN_BITS[stated]
    return bits_per_weight(parent) if parent is not None else None


def is_draft_alone(node: Node) -> bool:
    """Whether it is an export without the model that the draft is for."""
    return "draft_vocab_size" in node.metrics


def model_bytes(node: Node) -> float | None:
    """Of the weights as they are served.

    An export's files; of a checkpoint, whose files may hold optimizer states and values that export
    rounds, parameters times bits.
    """
    if node.stage == "export":
        return node.record.weight_bytes if node.record else None
    count, bits = parameters(node), bits_per_weight(node)
    return count * bits / 8 if count is not None and bits is not None else None


def quantized_as(node: Node) -> str:
    """Its format, in short; empty for a plain model."""
    algorithm = values.text(node.metrics, "quant_algo")
    return (
        algorithm
        or values.text(node.content, "quantization", "quant_algo")
        or (values.text(node.content, "quantization", "format"))
    )


def shown_bytes(count: float | None) -> str:
    return NOT_MEASURED if count is None else number_of_bytes(count)


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def signed(value: float) -> str:
    """In points of a percentage, with a sign."""
    return f"{100 * value:+.1f}".replace("-", MINUS)


def significant(value: float, digits: int = 3) -> str:
    """So many digits, whatever the size."""
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    if -6 < magnitude < 6:
        return f"{value:,.{max(0, digits - 1 - magnitude)}f}"
    return f"{value:.{digits - 1}e}"


def precise(value: float) -> str:
    """Of a perplexity, which models differ in late digits of."""
    return significant(value, 5)


def memory(record: Record | None) -> str:
    """Peaks of the run that made it, by kind."""
    peaks = values.mapping(record.content if record else {}, "peak_memory_bytes")
    known = {name: values.number(peaks, name) for name in peaks}
    shown = [f"{number_of_bytes(n)} {name}" for name, n in known.items() if n is not None]
    return ", ".join(shown) or NOT_MEASURED


def seconds(record: Record | None) -> str:
    found = values.number(record.content if record else {}, "seconds")
    if found is None:
        return NOT_MEASURED
    return f"{found:.1f} s" if found < 120 else f"{found / 60:.1f} min"


def signed_with(difference: float, spread: tuple[float, float] | None) -> str:
    """A difference of shares in points, with its interval."""
    text = signed(difference)
    return f"{text} ({signed(spread[0])} to {signed(spread[1])})" if spread else text


Difference = tuple[float, tuple[float, float] | None]


def change(before: Node, after: Node) -> Difference | None:
    """The difference of two models' scores; None unless the questions are the same.

    Paired, with the interval that was recorded, where one was evaluated beside the other.
    """
    for record in _newest_first(after.reports):
        found = values.mapping(record.content, *comparable.MMLU, "difference")
        paired = values.number(found, "difference")
        if paired is not None and record in before.references:
            return paired, values.interval(found, "interval_95")
    scores = score(before), score(after)
    return compared(scores[0], scores[1]) if scores[0] and scores[1] else None


def asked_the_same(one: Record, other: Record) -> bool:
    return comparable.questions(one) == comparable.questions(other)


def compared(before: Measured, after: Measured) -> Difference | None:
    """The difference of two scores, with a 95 % interval; None unless the questions are the same.

    The interval is Newcombe's (Statistics in Medicine 17, 1998, method 10), for two proportions
    with Wilson's intervals. It takes the samples for independent; as the questions are the same,
    the true one is narrower.
    """
    if not asked_the_same(before.record, after.record):
        return None
    difference = after.value - before.value
    if before.interval is None or after.interval is None:
        return difference, None
    low = math.hypot(after.value - after.interval[0], before.interval[1] - before.value)
    high = math.hypot(after.interval[1] - after.value, before.value - before.interval[0])
    return difference, (difference - low, difference + high)


def asked(record: Record) -> list[str]:
    """How many solved examples and questions a score is of, as far as it is known."""
    content = values.mapping(record.content, *comparable.MMLU, "model") or record.content
    shots, total = (values.number(content, name) for name in ("few_shots", "total"))
    found = [] if shots is None else [f"{shots:.0f}-shot"]
    return [*found, *([] if total is None else [f"{total:,.0f} questions"])]
