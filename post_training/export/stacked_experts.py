"""Experts that transformers has as one parameter, and a quantized folder one by one.

``experts.gate_up_proj`` [experts, in, 2 * out] is ``experts.0.gate_proj.weight`` [out, in] and so
on, and ``experts.down_proj`` [experts, in, out] is ``experts.0.down_proj.weight``.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping

import torch

_STACKED = (".experts.gate_up_proj", ".experts.down_proj")
_ONE = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


def named(
    expected: Mapping[str, tuple[int, ...]], stored: Container[str]
) -> dict[str, tuple[int, ...]]:
    """``expected`` with each expert's names and shapes for what is not ``stored`` as one tensor."""
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in expected.items():
        if name in stored or not name.endswith(_STACKED):
            found[name] = shape
            continue
        parent, _, own = name.rpartition(".")
        count, inputs, outputs = shape
        parts = ("gate_proj", "up_proj") if own == "gate_up_proj" else (own,)
        for number in range(count):
            for part in parts:
                found[f"{parent}.{number}.{part}.weight"] = (outputs // len(parts), inputs)
    return found


def joined(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The way back, of tensors that :func:`named` named."""
    found: dict[str, torch.Tensor] = {}
    experts: dict[str, dict[tuple[int, str], torch.Tensor]] = {}
    for name, weight in weights.items():
        if match := _ONE.fullmatch(name):
            parent, number, part = match.groups()
            experts.setdefault(parent, {})[int(number), part] = weight.T
        else:
            found[name] = weight
    for parent, parts in experts.items():
        count = range(len(parts) // 3)
        both = [torch.cat([parts[n, "gate"], parts[n, "up"]], dim=1) for n in count]
        found[f"{parent}.gate_up_proj"] = torch.stack(both)
        found[f"{parent}.down_proj"] = torch.stack([parts[n, "down"] for n in count])
    return found
