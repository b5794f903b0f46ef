"""What values a description of a model may have: their types, and how large they may be. No torch.

A description may come from anybody's file. A value of another type would be a traceback wherever it
is first computed with, and a size of billions becomes a list of as many entries.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, TypedDict

from post_training.common import forms
from post_training.common.errors import UsageError
from post_training.models import transformer_fields

_LARGEST = 1 << 24  # published models: a vocabulary of 262,144
_OTHERS = {
    "num_layers": 1 << 14,
    "num_moe_experts": 1 << 16,
    "max_position_embeddings": 1 << 40,
    "original_max_position_embeddings": 1 << 40,
}
_TYPES: dict[str, Any] = {
    "int": int,
    "float": float,
    "bool": bool,
    "str": str,
    "choice": str,  # flags have a choice; files may have further values, such as Gemma's fast_gelu
    "numbers": float | list[float],  # JSON's integers pass for floats, and stay what they are
}


def check_transformer(values: Mapping[str, Any], what: str, remedy: str) -> None:
    """Raise UsageError unless fields of megatron-core's configuration have the types of its table.

    None stands for a default of megatron-core's, whatever the type.
    """
    forms.parse(dict(values), _form(frozenset(values)), what, remedy)


@cache
def _form(names: frozenset[str]) -> Any:
    table = transformer_fields.load()
    fields = {name: _TYPES[table[name]["type"]] | None for name in sorted(names)}
    return TypedDict("Transformer", fields)  # type: ignore[operator]


def check_sizes(values: Mapping[str, Any], what: str, remedy: str) -> None:
    """Raise UsageError for a whole number that is negative, or larger than any model's."""
    for name, value in values.items():
        most = _OTHERS.get(name, _LARGEST)
        if isinstance(value, int) and not 0 <= value <= most:
            cause = "it is negative" if value < 0 else f"no model has more than {most:,}"
            raise UsageError(f"{what}: {name} = {value!r:.40}", cause, remedy)
