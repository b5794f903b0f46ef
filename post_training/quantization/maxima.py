"""Collecting the largest inputs of a model without waiting for the GPU at every one of them.

ModelOpt's calibrator asks, three times for each quantizer and batch, whether a maximum is a number,
which waits for the GPU; and it looks for the maximum of every weight again in each batch. Neither
changes a result: NaN and infinity go through a maximum and are found afterwards
(:func:`post_training.quantization.calibration.check_scales`), and weights do not change.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from modelopt.torch.quantization.calib import MaxCalibrator
from modelopt.torch.quantization.utils import (
    convert_quantization_axis_to_reduce_axis,
    reduce_amax,
)

from post_training.quantization import quantizers


class _Deferred(MaxCalibrator):
    """Collects as the original does, and asks nothing."""

    def __init__(self, original: MaxCalibrator) -> None:
        super().__init__(original._num_bits, original._axis, original._unsigned)
        self._calib_amax = original._calib_amax

    @torch.no_grad()
    def collect(self, x: torch.Tensor) -> None:
        axis = convert_quantization_axis_to_reduce_axis(x, self._axis)
        if axis is None and x.dtype in (torch.float32, torch.float16, torch.bfloat16):
            lowest, highest = torch.aminmax(x)  # reads the tensor once
            found = torch.maximum(lowest.abs(), highest.abs())
        else:
            found = reduce_amax(x, axis=axis)
        before = self._calib_amax
        if before is not None and before.shape != found.shape:
            raise RuntimeError(f"maxima of shape {found.shape} follow on {before.shape}")
        self._calib_amax = found if before is None else torch.maximum(before, found)


def are_all(model: torch.nn.Module) -> bool:
    """Whether nothing but maxima is collected now: a batch that was seen twice changes nothing."""
    return all(
        type(quantizer._calibrator) is MaxCalibrator and quantizer.bias_calibrator is None
        for _, quantizer in _collecting(model)
    )


@contextlib.contextmanager
def collecting(model: torch.nn.Module) -> Iterator[None]:
    """In the block maxima are collected without a wait, and those of weights not again."""
    with contextlib.ExitStack() as stack:
        for name, quantizer in _collecting(model):
            calibrator = quantizer._calibrator
            if type(calibrator) is not MaxCalibrator or calibrator._track_amax:
                continue
            quantizer._calibrator = _Deferred(calibrator)
            stack.callback(_restore, quantizer, calibrator)
            if "weight_quantizer" in name and calibrator.compute_amax() is not None:
                quantizer.disable_calib()
                stack.callback(quantizer.enable_calib)
        yield


def _restore(quantizer: Any, calibrator: MaxCalibrator) -> None:
    calibrator._calib_amax = quantizer._calibrator._calib_amax
    quantizer._calibrator = calibrator


def _collecting(model: torch.nn.Module) -> list[tuple[str, Any]]:
    """Name and quantizer of each that collects something."""
    found: list[tuple[str, Any]] = list(quantizers.enabled(model))
    return [(name, each) for name, each in found if each._if_calib and not each._dynamic]
