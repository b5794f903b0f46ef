"""The text model within a model that sees images: its values and its rules. No torch."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from post_training.models.families.base import WeightMapping
from post_training.models.families.refusal import refuse


def text(config: Mapping[str, Any]) -> dict[str, Any]:
    """``text_config``, with what the file says of tied embeddings at either place."""
    found = config.get("text_config")
    if not isinstance(found, Mapping):
        refuse(f"text_config = {found!r}", "the text model's values are needed")
    key = "tie_word_embeddings"
    tied = [each[key] for each in (config, found) if each.get(key) is not None]
    if any(each != tied[0] for each in tied):
        refuse(f"{key} = {tied[0]!r}", f"it is {tied[1]!r} in text_config")
    return {**found, **({key: tied[0]} if tied else {})}


def nested(rules: WeightMapping, prefix: str) -> WeightMapping:
    """``rules`` of a text model for one whose names all begin with ``prefix``."""
    found = []
    for mapping in rules:
        copies = {name: copy.copy(rule) for name, rule in mapping.items()}
        for rule in copies.values():
            if hasattr(rule, "target_name_or_prefix"):  # the others are switches
                rule.target_name_or_prefix = f"{prefix}{rule.target_name_or_prefix}"
        found.append(copies)
    return WeightMapping(*found)
