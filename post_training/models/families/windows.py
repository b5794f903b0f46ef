"""Layers that attend within a window beside layers that attend to the whole text. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from post_training.models.families.refusal import refuse

SLIDING, FULL = "sliding_attention", "full_attention"


def every(full: int, layers: int) -> list[int]:
    """1 for each layer within the window, where each ``full``-th attends to the whole text."""
    return [int((layer + 1) % full != 0) for layer in range(layers)]


def read(config: Mapping[str, Any], default: Sequence[int]) -> list[int]:
    """1 for each layer that attends within the window, by ``layer_types``; 0 for the others."""
    types, layers = config.get("layer_types"), config["num_hidden_layers"]
    return [int(each == SLIDING) for each in types[:layers]] if types else list(default)


def check(config: Mapping[str, Any], windows: Sequence[int]) -> None:
    """Raise UsageError for other kinds of layers than the two, or a window without a size."""
    types, layers = config.get("layer_types", []), config["num_hidden_layers"]
    if types and (len(types) < layers or not {*types} <= {SLIDING, FULL}):
        refuse(f"layer_types = {types!r}", f"{layers} layers need '{SLIDING}' or '{FULL}'")
    window = config.get("sliding_window")
    if any(windows) and not (isinstance(window, int) and window > 0):
        refuse(f"sliding_window = {window!r}", "layers attend within a window of this size")


def fields(config: Mapping[str, Any], windows: Sequence[int]) -> dict[str, Any]:
    """megatron-core's fields; nothing where no layer attends within the window."""
    if not any(windows):
        return {}
    # Keys before the query's own, which the window of the file counts too.
    return {
        "window_size": [config["sliding_window"] - 1, 0],
        "window_attn_skip_freq": list(windows),
    }


def types(windows: Sequence[int]) -> list[str]:
    """``layer_types`` of the file."""
    return [SLIDING if within else FULL for within in windows]
