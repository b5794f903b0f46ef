"""Integers and MXFP4 in the layout of the compressed-tensors package, which vLLM and SGLang load.

Each linear of the Hugging Face model has tensors of its own, q, k, v and gate, up apart:

- ``int-quantized``: ``weight`` int8 [out, in], ``weight_scale`` float32 [out, 1] and, unless each
  token of the inputs has its own, ``input_scale`` float32 [1];
- ``pack-quantized``: ``weight_packed`` int32 [out, in * bits / 32], element ``i`` of a word in its
  bits from ``i * bits`` on, plus ``2 ** (bits - 1)``; ``weight_scale`` in the model's dtype,
  [out, 1] or [out, in / group]; ``weight_shape`` int64 [2].
- ``mxfp4-pack-quantized``: ``weight_packed`` uint8 [out, in / 2], the first of two in the low
  half; ``weight_scale`` uint8 [out, in / 32], an exponent plus 127.

Beside each, scales of an FP8 cache: ``k_scale`` and ``v_scale`` of the attention, float32 [1].

``config.json`` says which, and names the linears that are left in 16 bits. The files of the
engines' loaders are in ``quantization/engines``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from post_training.common.safetensors_index import Entry
from post_training.export.folder import Tensors
from post_training.export.layout import Configuration, Layout, exactly, plain_linears

_FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
_INT8 = {**_FP8, "type": "int"}
_TOKENS = {"strategy": "token", "dynamic": True}
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_WORD = 32  # bits of an element of weight_packed


class Compressed(Layout):
    """What all layouts of the package share: one group of linears, and scales of a cache."""

    @abstractmethod
    def scheme(self) -> tuple[str, dict[str, Any], dict[str, Any] | None]:
        """The layout's name, and what is said about weights and inputs."""

    def described(self, targets: Sequence[str]) -> dict[str, Any]:
        """What is said about the linears that ``targets`` names, or the class of them."""
        layout, weights, inputs = self.scheme()
        return {
            "targets": [*targets],
            "weights": weights,
            "input_activations": inputs,
            "output_activations": None,
            "format": layout,
        }

    def cache_scale(self, name: str, value: torch.Tensor) -> Tensors:
        return cache_scale(name, value)

    def configuration(self, index: Mapping[str, Entry], kv_cache: str) -> Configuration:
        layout, *_ = self.scheme()
        return declared(layout, [self.described(["Linear"])], index, kv_cache)


@dataclass(frozen=True)
class Scheme(Compressed):
    """Integer weights.

    Attributes:
        bits: of a weight.
        group: weights of a row that share a scale; None: the whole row.
        packed: whether integers are packed into words, for kernels that unpack the weights.
        inputs: what is said about the inputs; None: they are in 16 bits.
    """

    bits: int
    group: int | None = None
    packed: bool = True
    inputs: Mapping[str, Any] | None = None

    def stored(
        self, module: str, value: torch.Tensor, steps: torch.Tensor, dtype: torch.dtype
    ) -> Tensors:
        scale = steps[:, :: self.group or steps.shape[1]].contiguous()
        codes = torch.round(value / steps).to(torch.int8)
        if not self.packed:
            return {f"{module}.weight": codes, f"{module}.weight_scale": scale}
        return {
            f"{module}.weight_packed": pack(codes, self.bits),
            f"{module}.weight_scale": exactly(module, scale, dtype),
            f"{module}.weight_shape": torch.tensor(value.shape),
        }

    def scheme(self) -> tuple[str, dict[str, Any], dict[str, Any] | None]:
        number = {"num_bits": self.bits, "type": "int", "symmetric": True, "dynamic": False}
        strategy = "group" if self.group else "channel"
        weights = {**number, "strategy": strategy, "group_size": self._group_size()}
        layout = "pack-quantized" if self.packed else "int-quantized"
        return layout, weights, None if self.inputs is None else dict(self.inputs)

    def _group_size(self) -> int | None:
        """As vLLM 0.24 wants it: its kernel of experts stops at a null for a scale a row."""
        return self.group or (-1 if self.packed else None)


@dataclass(frozen=True)
class Mxfp4(Compressed):
    """E2M1 numbers times a power of two for 32 of a row.

    Attributes:
        inputs: whether inputs are such numbers too.
    """

    inputs: bool

    def stored(
        self, module: str, value: torch.Tensor, steps: torch.Tensor, dtype: torch.dtype
    ) -> Tensors:
        numbers = torch.tensor(_E2M1, device=value.device)
        scaled = value / steps
        codes = torch.bucketize(scaled.abs(), numbers) + 8 * scaled.signbit()
        pairs = codes.to(torch.uint8).unflatten(1, (-1, 2))
        _, exponent = torch.frexp(steps[:, ::32])
        return {
            f"{module}.weight_packed": pairs[..., 0] | pairs[..., 1] << 4,
            f"{module}.weight_scale": (exponent - 1 + 127).to(torch.uint8),
        }

    def scheme(self) -> tuple[str, dict[str, Any], dict[str, Any] | None]:
        number = {"num_bits": 4, "type": "float", "symmetric": True, "dynamic": False}
        weights = {**number, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
        inputs = {**weights, "dynamic": True} if self.inputs else None
        return "mxfp4-pack-quantized", weights, inputs


# By the name that quantization/formats gives them.
LAYOUTS: dict[str, Compressed] = {
    "INT8_W8A8": Scheme(8, packed=False, inputs={**_INT8, "strategy": "tensor"}),
    "INT8_PER_CHANNEL_PER_TOKEN": Scheme(8, packed=False, inputs={**_INT8, **_TOKENS}),
    "INT8_W8A16": Scheme(8),
    "INT4_W4A16": Scheme(4, group=128),
    "INT4_W4A8": Scheme(4, group=128, inputs={**_FP8, **_TOKENS}),
    "MXFP4": Mxfp4(inputs=True),
    "W4A16_MXFP4": Mxfp4(inputs=False),
}


def cache_scale(name: str, value: torch.Tensor) -> Tensors:
    """Of the attention, as the package names it, and not of its projections."""
    attention, _, kind = name.rsplit(".", 2)
    return {f"{attention}.{kind}": value.reshape(1)}


def declared(
    layout: str, groups: Sequence[Mapping[str, Any]], index: Mapping[str, Entry], kv_cache: str
) -> Configuration:
    """``quantization_config`` for groups of linears."""
    return Configuration(
        {
            "quant_method": "compressed-tensors",
            "format": layout,
            "quantization_status": "compressed",
            "kv_cache_scheme": {**_FP8, "strategy": "tensor"} if kv_cache else None,
            "ignore": plain_linears(index),
            "config_groups": {f"group_{number}": each for number, each in enumerate(groups)},
        }
    )


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Signed integers of ``bits`` bits, int8 [out, in], to int32 [out, in * bits / 32]."""
    per_word = _WORD // bits
    words = (codes.long() + 2 ** (bits - 1)).unflatten(1, (-1, per_word))
    shifts = torch.arange(per_word, device=codes.device) * bits
    # The bits of the elements do not overlap, so a sum sets them.
    whole = (words << shifts).sum(-1)
    return torch.where(whole >= 2 ** (_WORD - 1), whole - 2**_WORD, whole).to(torch.int32)
