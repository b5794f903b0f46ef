"""Weights that a Hugging Face folder holds quantized, read as the numbers that they stand for.

A reader is one class and one row of ``READERS``; which descriptions it takes is checked before
anything is loaded (``models/quantized_files.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from post_training.common.safetensors_index import Entry


class BlockFp8:
    """E4M3 codes, and a scale for each block of rows and columns in ``<name>_scale_inv``.

    The scale multiplies, in spite of its name.

    Args:
        quantization: content of ``quantization_config``.
    """

    scales: ClassVar[str] = "_scale_inv"

    def __init__(self, quantization: Mapping[str, Any]) -> None:
        self.block: list[int] = quantization["weight_block_size"]

    def decode(
        self, codes: torch.Tensor, scales: torch.Tensor, starts: Sequence[int]
    ) -> torch.Tensor:
        """The values in float32, of which one rounding makes bf16.

        Args:
            codes: part of a matrix, float8.
            scales: of the whole matrix, [row blocks, column blocks].
            starts: row and column of the whole matrix where ``codes`` starts.

        Raises:
            ValueError: if there is no scale for some element.
        """
        rows, columns = (
            torch.arange(start, start + count) // size
            for start, count, size in zip(starts, codes.shape, self.block, strict=True)
        )
        if rows[-1] >= scales.shape[0] or columns[-1] >= scales.shape[1]:
            raise ValueError(f"scales {list(scales.shape)} are too few for blocks of {self.block}")
        return codes.float() * scales.float()[rows][:, columns]


READERS = {"fp8": BlockFp8}


def reader(config: Mapping[str, Any]) -> BlockFp8 | None:
    """The reader for the weights that ``config`` describes; None for plain ones."""
    found = config.get("quantization_config") or {}
    return READERS[found["quant_method"]](found) if found else None


def is_packed(entry: Entry) -> bool:
    """Whether a stored tensor holds codes."""
    return entry.dtype.startswith("F8_E4M3")
