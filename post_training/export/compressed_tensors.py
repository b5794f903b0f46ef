"""Integers in the layout of the compressed-tensors package, which vLLM and SGLang load.

Each linear of the Hugging Face model has tensors of its own, q, k, v and gate, up apart:

- ``int-quantized``: ``weight`` int8 [out, in], ``weight_scale`` float32 [out, 1] and
  ``input_scale`` float32 [1];
- ``pack-quantized``: ``weight_packed`` int32 [out, in * bits / 32], element ``i`` of a word in its
  bits from ``i * bits`` on, plus ``2 ** (bits - 1)``; ``weight_scale`` in the model's dtype,
  [out, 1] or [out, in / group]; ``weight_shape`` int64 [2].

``config.json`` says which, and names the linears that are left in 16 bits. The files of the
engines' loaders are in ``quantization/engines``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from post_training.common.errors import UsageError
from post_training.common.safetensors_index import Entry
from post_training.export.folder import Tensors
from post_training.export.layout import Configuration, Layout, plain_linears

_WORD = 32  # bits of an element of weight_packed


@dataclass(frozen=True)
class Scheme(Layout):
    """How the linears of a model are stored.

    Attributes:
        bits: of a weight.
        group: weights of a row that share a scale; None: the whole row.
        static_inputs: inputs are integers of the same size too, with one calibrated scale.
    """

    bits: int
    group: int | None = None
    static_inputs: bool = False

    def stored(
        self, module: str, value: torch.Tensor, steps: torch.Tensor, dtype: torch.dtype
    ) -> Tensors:
        scale = steps[:, :: self.group or steps.shape[1]].contiguous()
        codes = torch.round(value / steps).to(torch.int8)
        if self.static_inputs:
            return {f"{module}.weight": codes, f"{module}.weight_scale": scale}
        if not torch.equal(scale.to(dtype).float(), scale):
            raise UsageError(
                f"the scales of {module}",
                f"{dtype} does not hold them, and engines read scales in the model's dtype",
                "quantize the model again with this version",
            )
        return {
            f"{module}.weight_packed": pack(codes, self.bits),
            f"{module}.weight_scale": scale.to(dtype),
            f"{module}.weight_shape": torch.tensor(value.shape),
        }

    def configuration(self, index: Mapping[str, Entry], kv_cache: str) -> Configuration:
        number = {"num_bits": self.bits, "type": "int", "symmetric": True, "dynamic": False}
        weights = {**number, "strategy": "group" if self.group else "channel"}
        inputs = {**number, "strategy": "tensor"} if self.static_inputs else None
        layout = "int-quantized" if self.static_inputs else "pack-quantized"
        declared = {
            "quant_method": "compressed-tensors",
            "format": layout,
            "quantization_status": "compressed",
            "kv_cache_scheme": None,
            "ignore": plain_linears(index),
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {**weights, "group_size": self._group_size()},
                    "input_activations": inputs,
                    "output_activations": None,
                    "format": layout,
                }
            },
        }
        return Configuration(declared)

    def _group_size(self) -> int | None:
        """As vLLM 0.24 wants it: its kernel of experts stops at a null for a scale a row."""
        return self.group or (None if self.static_inputs else -1)


# By the name that quantization/formats gives them.
LAYOUTS: dict[str, Layout] = {
    "INT8_W8A8": Scheme(8, static_inputs=True),
    "INT8_W8A16": Scheme(8),
    "INT4_W4A16": Scheme(4, group=128),
}


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Signed integers of ``bits`` bits, int8 [out, in], to int32 [out, in * bits / 32]."""
    per_word = _WORD // bits
    words = (codes.long() + 2 ** (bits - 1)).unflatten(1, (-1, per_word))
    shifts = torch.arange(per_word, device=codes.device) * bits
    # The bits of the elements do not overlap, so a sum sets them.
    whole = (words << shifts).sum(-1)
    return torch.where(whole >= 2 ** (_WORD - 1), whole - 2**_WORD, whole).to(torch.int32)
