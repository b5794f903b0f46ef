"""Experts that transformers has as one parameter, and a quantized folder one by one.

``experts.gate_up_proj`` is ``experts.0.gate_proj.weight`` [out, in] and so on, and
``experts.down_proj`` is ``experts.0.down_proj.weight``, by the names that the family has for them.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping

import torch

from post_training.models.families.stacked import StackedExperts


def named(
    expected: Mapping[str, tuple[int, ...]], stored: Container[str], stacked: StackedExperts | None
) -> dict[str, tuple[int, ...]]:
    """``expected`` with each expert's names and shapes for what is not ``stored`` as one tensor.

    transformers saves some experts one by one that published files have in one tensor.
    """
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in _together(expected, stacked).items():
        whole = _whole(name, stacked)
        if stacked is None or name in stored or not whole:
            found[name] = shape
            continue
        count, outputs, inputs = shape
        if stacked.inputs_first:
            inputs, outputs = outputs, inputs
        parts = stacked.one[:2] if whole == stacked.gate_up else stacked.one[2:]
        for number in range(count):
            for part in parts:
                own = f"experts.{number}.{part}.weight"
                found[name.removesuffix(whole) + own] = (outputs // len(parts), inputs)
    return found


def joined(
    weights: Mapping[str, torch.Tensor], stacked: StackedExperts | None
) -> dict[str, torch.Tensor]:
    """The way back, of tensors that :func:`named` named."""
    if stacked is None:
        return dict(weights)
    one = re.compile(rf"(.*\.)experts\.(\d+)\.({'|'.join(stacked.one)})\.weight")
    found: dict[str, torch.Tensor] = {}
    experts: dict[str, dict[tuple[int, str], torch.Tensor]] = {}
    for name, weight in weights.items():
        if match := one.fullmatch(name):
            parent, number, part = match.groups()
            experts.setdefault(parent, {})[int(number), part] = weight
        else:
            found[name] = weight
    gate, up, down = stacked.one
    for parent, parts in experts.items():
        count = range(len(parts) // 3)
        both = torch.stack([torch.cat([parts[n, gate], parts[n, up]]) for n in count])
        downs = torch.stack([parts[n, down] for n in count])
        for own, whole in ((stacked.gate_up, both), (stacked.down, downs)):
            found[f"{parent}{own}"] = whole.mT if stacked.inputs_first else whole
    return found


def _together(
    expected: Mapping[str, tuple[int, ...]], stacked: StackedExperts | None
) -> dict[str, tuple[int, ...]]:
    """``expected`` with the experts of a layer in one tensor."""
    meta = {name: torch.empty(shape, device="meta") for name, shape in expected.items()}
    return {name: tuple(each.shape) for name, each in joined(meta, stacked).items()}


def _whole(name: str, stacked: StackedExperts | None) -> str:
    """Which of the family's two tensors ``name`` is; empty for none."""
    both = (stacked.gate_up, stacked.down) if stacked else ()
    return next((each for each in both if name.endswith(f".{each}")), "")
