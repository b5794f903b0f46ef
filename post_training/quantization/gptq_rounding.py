"""GPTQ of one weight: columns are rounded in order, and those after them take up the error."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from post_training.quantization import quantizers

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
    scales = quantizers.scale_of(quantizer._amax, quantizer).reshape(rows, -1)
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
    round_block: Callable[..., Any] = partial(_round_block, largest)
    if weight.is_cuda:
        round_block = _Recorded(round_block)
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
        found, errors = round_block(block, inverse[start:end, start:end], scales[:, group])
        rounded[:, start:end] = found
        weight[:, end:] -= errors @ inverse[start:end, end:]
    return rounded, scales


def _round_block(
    largest: float, block: torch.Tensor, inverse: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round the columns of a block, each taking up the errors of those before it.

    Returns the values on the grid and each column's error over its diagonal entry, both the shape
    of the block, float32 [out, step]; ``inverse`` is [step, step], ``scale`` [out].
    """
    block = block.clone()
    rounded, errors = torch.empty_like(block), torch.empty_like(block)
    for i in range(block.shape[1]):
        rounded[:, i] = _round(block[:, i], scale, largest)
        errors[:, i] = (block[:, i] - rounded[:, i]) / inverse[i, i]
        block[:, i:] -= torch.outer(errors[:, i], inverse[i, i:])
    return rounded, errors


class _Recorded:
    """A function of CUDA tensors as a CUDA graph, for calls with tensors of the same shapes.

    Rounding a column takes eight small kernels, which launch slower than they run. The tensors
    that a call returns are overwritten by the next one.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.graph: torch.cuda.CUDAGraph | None = None
        self.given: list[torch.Tensor] = []
        self.found: Any = None

    def __call__(self, *given: torch.Tensor) -> Any:
        if [each.shape for each in given] != [each.shape for each in self.given]:
            self.given = [each.clone() for each in given]
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):  # what loads on first use cannot be recorded
                self.function(*self.given)
            torch.cuda.current_stream().wait_stream(aside)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.found = self.function(*self.given)
        for mine, each in zip(self.given, given, strict=True):
            mine.copy_(each)
        assert self.graph is not None
        self.graph.replay()
        return self.found


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
