"""What a decoder consists of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

# Reads a stored tensor by name, such as "model.layers.0.mlp.up_proj.weight_scale".
Read = Callable[[str], torch.Tensor]


@dataclass(frozen=True)
class Decoder:
    """How the weights of one ``quant_algo`` are stored.

    Attributes:
        algorithm: ``quant_algo`` of ``hf_quant_config.json``, or our name for what a configuration
            of compressed-tensors describes.
        dtype: of the stored weight, as safetensors names it.
        decode: of (read, module, stored weight) -> float32 [out, in].
        per_element: weights of a row that an element of the stored tensor holds.
        rows_per_element: rows of which it holds one each.
        scales: names of the tensors that stand beside the weight, all of them.
        block: inputs of a row that share a scale, where ``group_size`` says it.
        stored: name of the tensor that holds it.
        zero_scales: whether a block so small that its scale has the code zero may be stored.
    """

    algorithm: str
    dtype: str
    decode: Callable[[Read, str, torch.Tensor], torch.Tensor]
    per_element: int = 1
    rows_per_element: int = 1
    scales: tuple[str, ...] = ("weight_scale", "input_scale")
    stored: str = "weight"
    block: int | None = None
    zero_scales: bool = False

    def weight(self, read: Read, module: str) -> torch.Tensor:
        """The weight of a linear, float32 [out, in]; ValueError if it is not stored so."""
        packed = read(f"{module}.{self.stored}")
        if packed.dim() != 2:
            raise ValueError(f"{module} is stored with the shape {tuple(packed.shape)}")
        try:
            return self.decode(read, module, packed)
        except (IndexError, RuntimeError) as error:  # of scales that fit no row or block
            raise ValueError(f"{module} cannot be decoded: {error}") from error


def require_dtype(what: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    """Raise ValueError for a tensor of another dtype."""
    if tensor.dtype != dtype:
        raise ValueError(f"{what} is stored as {tensor.dtype} instead of {dtype}")


def require_shape(module: str, scale: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError for a scale of another shape."""
    if tuple(scale.shape) != shape:
        raise ValueError(f"{module} has a scale of shape {tuple(scale.shape)} instead of {shape}")
