"""Compare an exported folder's weights with those of the model that it was made from."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from post_training.export.readback import Folder

_PIECE = 1 << 24  # elements compared at a time


def compare(
    folder: Folder, reference: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype
) -> list[str]:
    """Compare stored weights with the weights of the model they came from.

    Args:
        reference: name and value: fake-quantized weights, scales, and what is not quantized, in any
            floating dtype.
        dtype: in which the model computed its fake quantization. The folder's product
            ``code * scale`` is rounded once, to float32; the model multiplies and divides by the
            scale's parts and rounds to ``dtype``. Equality is required to one unit in the last
            place of ``dtype`` and two of float32.

    Returns:
        One line per tensor that differs by more.
    """
    tolerance = torch.finfo(dtype).eps + 2 * torch.finfo(torch.float32).eps
    found = []
    for name, wanted in reference:
        try:
            actual = folder.value(name)
        except (KeyError, ValueError) as error:
            found.append(f"{name}: {error}")
            continue
        wanted = wanted.to(actual.device)
        if wanted.dim() == 0 and actual.numel() == 1:
            actual = actual.reshape(())
        if actual.shape != wanted.shape:
            found.append(f"{name}: shape {tuple(actual.shape)} instead of {tuple(wanted.shape)}")
        elif not _equal(actual, wanted, tolerance):
            worst = (actual.float() - wanted.float()).abs().max().item()
            found.append(f"{name} differs from the model's weight by up to {worst:.3g}")
    return found


def _equal(actual: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> bool:
    """Whether every element is within ``tolerance``, relative; NaN never is.

    Piece by piece: a whole embedding's temporaries would be the peak of an export's memory.
    """
    pieces = zip(actual.flatten().split(_PIECE), wanted.flatten().split(_PIECE), strict=True)
    smallest = torch.finfo(torch.float32).tiny
    return all(
        torch.allclose(a.float(), w.float(), rtol=tolerance, atol=smallest) for a, w in pieces
    )
