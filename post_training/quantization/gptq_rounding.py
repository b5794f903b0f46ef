"""GPTQ of one weight: columns are rounded in order, and those after them take up the error."""

from __future__ import annotations

from typing import Any

import torch

# Columns whose error is spread within the block first, and to the rest of the row at once.
_BLOCK = 128
# Parts of the mean diagonal that are added to it, until the Hessian can be inverted.
_DAMPING = (0.01, 0.1, 1.0)


def quantize(linear: Any, hessian: torch.Tensor) -> float | None:
    """Put ``linear``'s weight on the grid of its quantizer, and set the scales of the blocks.

    The quantizer has scales of the plain weight already. A weight whose output error is not below
    that of rounding to nearest stays as it is.

    Args:
        hessian: sum of x x^T over the layer's inputs, float32 [in, in], finite.

    Returns:
        The squared error of the outputs over that of rounding to nearest; None if that is not less.
    """
    quantizer = linear.weight_quantizer
    weight = linear.weight.detach().float()
    rows, columns = weight.shape
    largest = float(quantizer.maxbound)
    scales = quantizer._amax.float().reshape(rows, -1) / largest
    nearest = _round(weight, scales.repeat_interleave(columns // scales.shape[1], 1), largest)
    inverse = inverse_factor(hessian)
    if inverse is None:
        return None
    rounded, scales = spread(weight, inverse, scales, largest)
    stored = rounded.to(linear.weight.dtype)
    before = output_error(nearest.to(stored.dtype).float() - weight, hessian)
    after = output_error(stored.float() - weight, hessian)
    if not after < before:
        return None
    linear.weight.data.copy_(stored)
    quantizer._amax = (scales * largest).reshape(quantizer._amax.shape)
    return after / before


def spread(
    weight: torch.Tensor, inverse: torch.Tensor, scales: torch.Tensor, largest: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round column after column. Returns the values on the grid [out, in] and the scales.

    Args:
        weight: float32 [out, in].
        inverse: from :func:`inverse_factor`.
        scales: float32 [out, groups]. Of several groups each gets its scale, a number of bfloat16,
            when its first column is reached, from the weights as they are then.
        largest: code of the positive end.
    """
    weight, scales = weight.clone(), scales.clone()
    rounded = torch.empty_like(weight)
    columns, groups = weight.shape[1], scales.shape[1]
    size = columns // groups
    step = min(size, _BLOCK)
    for start in range(0, columns, step):
        end = min(start + step, columns)
        group = start // size
        block = weight[:, start:end]
        if groups > 1 and start % size == 0:
            scales[:, group] = _scale(weight[:, start : start + size], largest)
        errors = torch.empty_like(block)
        within = inverse[start:end, start:end]
        for i in range(end - start):
            value = _round(block[:, i], scales[:, group], largest)
            errors[:, i] = (block[:, i] - value) / within[i, i]
            block[:, i:] -= torch.outer(errors[:, i], within[i, i:])
            rounded[:, start + i] = value
        weight[:, end:] -= errors @ inverse[start:end, end:]
    return rounded, scales


def inverse_factor(hessian: torch.Tensor) -> torch.Tensor | None:
    """Upper Cholesky factor of the damped Hessian's inverse, [in, in]; None if there is none.

    An input that was always zero neither spreads nor takes up an error.
    """
    diagonal = hessian.diagonal()
    if not bool(diagonal.any()):
        return None
    for damping in _DAMPING:
        damped = hessian.clone()
        damped.diagonal().add_(damping * diagonal.mean())
        factor, failed = torch.linalg.cholesky_ex(damped)
        if failed:
            continue
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
        if not failed and bool(upper.isfinite().all()):
            return upper
    return None


def output_error(difference: torch.Tensor, hessian: torch.Tensor) -> float:
    """Sum over the inputs of the squared change of the outputs, for a change of the weight."""
    return float(((difference @ hessian) * difference).sum(dtype=torch.float64))


def _scale(weight: torch.Tensor, largest: float) -> torch.Tensor:
    """Of each row, float32 [out] of numbers of bfloat16; 1 where all weights are zero."""
    scale = (weight.abs().amax(1) / largest).bfloat16().float()
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def _round(value: torch.Tensor, scale: torch.Tensor, largest: float) -> torch.Tensor:
    """To the nearest code times the scale; ModelOpt's integers have one more negative code."""
    return (value / scale).round().clamp(-largest - 1, largest) * scale
