"""Weights that a Hugging Face folder holds quantized, read as the numbers that they stand for.

A reader is one class and one row of ``READERS``; which descriptions it takes is checked before
anything is loaded (``models/quantized_files.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

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

    def values_in(self, name: str, entry: Entry) -> int:
        """How many weights a stored tensor stands for."""
        return entry.numel

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


class Mxfp4:
    """E2M1 codes, two a byte in ``<name>_blocks``, and a power of two for 32 in ``<name>_scales``.

    gpt-oss has its experts so: [experts, out, in / 32, 16 bytes] for what is [experts, in, out]
    where it is not quantized.

    Args:
        quantization: content of ``quantization_config``.
    """

    codes: ClassVar[str] = "_blocks"
    scales: ClassVar[str] = "_scales"
    _magnitudes: ClassVar[tuple[float, ...]] = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

    def __init__(self, quantization: Mapping[str, Any]) -> None:
        pass

    def values_in(self, name: str, entry: Entry) -> int:
        """How many weights a stored tensor stands for."""
        return 2 * entry.numel if name.endswith(self.codes) else entry.numel

    def decode(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """The values in bf16, which holds all of them exactly: [experts, in, out].

        Raises:
            ValueError: if there is not one scale for each 16 bytes.
        """
        if codes.shape[-1] != 16 or codes.shape[:-1] != scales.shape:
            raise ValueError(f"blocks {list(codes.shape)} with scales {list(scales.shape)}")
        table = torch.tensor([*self._magnitudes, *(-value for value in self._magnitudes)])
        experts, rows, blocks, _ = codes.shape
        result = torch.empty(experts, rows, blocks * 32, dtype=torch.bfloat16)
        # One expert at a time: indices take many times the room of the codes.
        for values, code, scale in zip(result, codes.int(), scales.int(), strict=True):
            pairs = torch.stack([table[code & 15], table[code >> 4]], dim=-1)
            exponent = (scale - 127)[..., None]
            values.copy_(torch.ldexp(pairs.flatten(-2), exponent).flatten(-2))
        return result.mT


class Exported(Protocol):
    """A folder that an export made of a quantized model, read as the numbers that it stands for."""

    @property
    def index(self) -> Mapping[str, Entry]:
        """The weights' plain names and shapes."""

    @property
    def rounds_more(self) -> bool:
        """Whether an engine rounds inputs, keys or values too."""

    def read(self, name: str) -> torch.Tensor:
        """A whole weight in float32; ValueError if it is not stored as the folder says."""


READERS: dict[str, type[BlockFp8 | Mxfp4]] = {"fp8": BlockFp8, "mxfp4": Mxfp4}


def reader(config: Mapping[str, Any]) -> BlockFp8 | Mxfp4 | None:
    """The reader for the weights that ``config`` describes; None for plain ones.

    None too for a method that is not read: what loads weights has refused it before.
    """
    found = config.get("quantization_config") or {}
    kind = READERS.get(found.get("quant_method", ""))
    return kind(found) if kind is not None else None


def is_packed(entry: Entry) -> bool:
    """Whether a stored tensor holds codes."""
    return entry.dtype.startswith("F8_E4M3")
