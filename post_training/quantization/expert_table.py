"""What calibration showed the experts of each layer, for people. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from post_training.common import report

if TYPE_CHECKING:
    from rich.table import Table

_LAYERS_SHOWN = 12
_RANGES_SHOWN = 8


@dataclass(frozen=True)
class _Layer:
    """One layer's experts.

    Attributes:
        name: its number, from 0.
        routed: tokens that the router sent to each expert.
        reached: tokens that each was calibrated on.
    """

    name: str
    routed: Sequence[int]
    reached: Sequence[int]

    @property
    def idle(self) -> list[int]:
        """Experts without a token, by number."""
        return [n for n, tokens in enumerate(self.reached) if not tokens]

    @property
    def unchosen(self) -> list[int]:
        """Experts that the router chose for no token, by number."""
        return [n for n, tokens in enumerate(self.routed) if not tokens]


def describe(used: Mapping[str, Any]) -> str:
    """A line for the summary, and what experts without any token have.

    Args:
        used: ``Calibration.to_json``.
    """
    layers = _layers(used)
    total = sum(len(each.routed) for each in layers)
    idle = sum(len(each.idle) for each in layers)
    if idle:
        return (
            f"{idle} of {total} got no calibration token: their inputs have the scale of their "
            f"layer's other experts; more data (--calib-size) or --moe-calibrate all reaches them"
        )
    tokens = [count for each in layers for count in each.reached]
    number = f"{len(layers)} layers" if len(layers) > 1 else "1 layer"
    range_ = (
        f"{min(tokens):,} to {max(tokens):,}" if min(tokens) < max(tokens) else str(min(tokens))
    )
    text = f"{total} in {number}, {range_} tokens each"
    unchosen = sum(len(each.unchosen) for each in layers)
    if unchosen:
        text += f"; the router chose {unchosen} of them for none"
    return text


def show(used: Mapping[str, Any]) -> None:
    """Print the table, if the model has experts."""
    from rich.console import Console

    if used["expert_tokens"]:
        Console(stderr=True).print(table(used))


def table(used: Mapping[str, Any]) -> Table:
    """Tokens of the experts by layer: of many layers those with the most idle and least busy ones.

    Args:
        used: ``Calibration.to_json``.
    """
    from rich.table import Table

    layers = _layers(used)
    title = "calibration tokens of each layer's experts"
    found = Table(title=title, title_justify="left", title_style="bold")
    found.add_column("layer", style="cyan", no_wrap=True)
    for name in ("experts", "least", "median", "most"):
        found.add_column(name, justify="right", no_wrap=True)
    widened = bool(used["expert_tokens_added"])
    if widened:
        found.add_column("calibrated on", justify="right", no_wrap=True)
    found.add_column("chosen for none" if widened else "without any", overflow="fold")
    worst = sorted(layers, key=lambda each: (-len(each.unchosen), min(each.routed)))
    shown = {each.name for each in worst[:_LAYERS_SHOWN]}
    for each in layers:
        if each.name in shown:
            found.add_row(*_row(each, widened))
    others = [each for each in layers if each.name not in shown]
    if others:
        found.add_section()
        found.add_row(*_row_of_many(others, widened))
    return found


def _layers(used: Mapping[str, Any]) -> list[_Layer]:
    """In order."""
    added = used["expert_tokens_added"]
    return [
        _Layer(name, tokens, [a + b for a, b in zip(tokens, added[name], strict=True)])
        if name in added
        else _Layer(name, tokens, tokens)
        for name, tokens in sorted(used["expert_tokens"].items(), key=lambda item: int(item[0]))
    ]


def _row(layer: _Layer, widened: bool) -> list[str]:
    tokens, without = layer.routed, layer.unchosen
    numbers = f"{len(without)}: {report.ranges(without, _RANGES_SHOWN)}" if without else "0"
    reached = [f"{min(layer.reached):,} or more"] if widened else []
    return [layer.name, str(len(tokens)), *_spread(tokens), *reached, numbers]


def _row_of_many(layers: Sequence[_Layer], widened: bool) -> list[str]:
    tokens = [count for each in layers for count in each.routed]
    reached = [f"{min(min(each.reached) for each in layers):,} or more"] if widened else []
    without = sum(len(each.unchosen) for each in layers)
    name = f"{len(layers)} others"
    return [name, str(len(tokens)), *_spread(tokens), *reached, str(without)]


def _spread(tokens: Sequence[int]) -> list[str]:
    return [f"{min(tokens):,}", f"{median(tokens):,.0f}", f"{max(tokens):,}"]
