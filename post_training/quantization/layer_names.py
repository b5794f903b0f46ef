"""Names of linear layers, and the patterns by which some of them stay in 16 bits. No torch.

A name is Megatron's, ``decoder.layers.3.mlp.linear_fc2``, with the layer's number in the whole
model.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from post_training.common.errors import UsageError, suggest

# Megatron's names for what recipes and people call by Hugging Face's: the linear with its rows.
MEGATRON_NAMES = (
    (re.compile(r"(?<![a-z])o_proj"), "linear_proj"),
    (re.compile(r"(?<![a-z])[qkv]_proj"), "linear_qkv"),
    (re.compile(r"(?<![a-z])(gate_up|gate|up)_proj"), "linear_fc1"),
    (re.compile(r"(?<![a-z])down_proj"), "linear_fc2"),
    (re.compile(r"(?<![a-z])in_proj_(qkvz|qkv|z)(?![a-z])"), "in_proj"),
)
_MEGATRON_PARENTS = (
    (re.compile(r"^(language_)?model\.layers\."), "decoder.layers."),
    (re.compile(r"(?<![a-z_])(self|linear)_attn(?![a-z])"), "self_attention"),
    (re.compile(r"(?<![a-z])shared_expert(?![a-z])"), "shared_experts"),
    (re.compile(r"(?<![a-z_])experts\.(?=[\d*\[?])"), "experts.local_experts."),
    (re.compile(r"(?<![a-z_])lm_head"), "output_layer"),
)
EXPERT = re.compile(r"\.local_experts\.(\d+)\.")
_SHOWN = 5
_LONGEST = 500  # fnmatch takes seconds for a pattern of thousands of brackets
# Linears that compute queries, keys and values; with multi-latent attention there are several.
QKV = ("*.linear_qkv", "*.linear_q_*proj", "*.linear_kv_*proj")
_EXPERTS = re.compile(r"^(.*\.local_experts)\.\d+\.")
_FLAG = "--leave-out"


def translated(pattern: str) -> str:
    """The pattern with Megatron's names where it has Hugging Face's.

    ``*k_proj`` becomes ``*linear_qkv``: rows of one linear are not left out alone.
    """
    for found, ours in (*_MEGATRON_PARENTS, *MEGATRON_NAMES):
        pattern = found.sub(ours, pattern)
    return pattern


def note(patterns: Sequence[str]) -> str:
    """What there is to say about patterns that had Hugging Face's names."""
    return (
        f"{_FLAG} is read as {' '.join(patterns)}; q, k and v are one linear, and so are gate and "
        "up: they are left out together"
    )


def matching(name: str, patterns: Iterable[str]) -> str:
    """The first pattern that matches a linear's name; empty if none does."""
    return next((each for each in patterns if fnmatch.fnmatchcase(name, each)), "")


def pattern_of(name: str) -> str:
    """The pattern that leaves out a linear and those like it in the other layers.

    Experts are left out as a whole: engines have one method for all linears of a layer's experts.
    """
    if ".local_experts." in name:
        return "*.local_experts.*"
    parts = name.split(".")
    return f"*.{'.'.join(parts[-2:])}" if len(parts) > 1 else f"*{name}"


def check(patterns: Sequence[str], names: Collection[str]) -> None:
    """Refuse patterns that match no linear layer, or a part of a layer's experts.

    Args:
        patterns: translated.
        names: of all linear layers.

    Raises:
        UsageError: naming the pattern and the nearest ones that match.
    """
    for pattern in patterns:
        if len(pattern) > _LONGEST:
            raise UsageError(
                f"{_FLAG} {pattern[:_LONGEST]}...",
                f"it has {len(pattern):,} characters, and a linear layer has a name of a few dozen",
                "give a pattern of names, such as '*.linear_fc2'",
            )
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise UsageError(
                f"{_FLAG} {pattern}", "no linear layer matches it", _nearest(pattern, names)
            )
    whole: dict[str, list[str]] = {}
    for name in names:
        if found := _EXPERTS.match(name):
            whole.setdefault(found[1], []).append(name)
    for experts, linears in whole.items():
        left = [name for name in linears if matching(name, patterns)]
        if left and len(left) < len(linears):
            raise UsageError(
                f"{_FLAG} {' '.join(patterns)}",
                f"it matches {len(left)} of the {len(linears)} linears of {experts}, which engines "
                "compute with one method",
                f"leave out all of them ({_FLAG} '{experts}.*'; in every layer "
                f"'{pattern_of(linears[0])}') or none",
            )


def _nearest(pattern: str, names: Collection[str]) -> str:
    wider = f"*{pattern.strip('*')}*"
    if any(fnmatch.fnmatchcase(name, wider) for name in names):
        return f"did you mean '{wider}'? A pattern is compared with the whole name"
    found = {pattern_of(name) for name in names}
    known = sorted(found | {f"*.{each.rpartition('.')[2]}" for each in found} - {"*.*"})
    return suggest(pattern, known) or f"the model has {', '.join(known)}"


def is_expert(name: str) -> bool:
    """Whether a module is part of an expert that the router chooses."""
    return EXPERT.search(name) is not None


def global_name(model: Any, name: str) -> str:
    """Replace the layer's place on this pipeline stage by its number in the model, from 0."""
    parts = name.split(".")
    if len(parts) > 2 and parts[:2] == ["decoder", "layers"] and parts[2].isdecimal():
        layer: Any = model.get_submodule(".".join(parts[:3]))
        parts[2] = str(layer.layer_number - 1)
    return ".".join(parts)


def first_names(names: Sequence[str]) -> str:
    """A few of them, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
