"""INT8 and INT4 weights in ModelOpt's layout, which TensorRT-LLM loads.

Each linear of the Hugging Face model has tensors of its own, q, k, v and gate, up apart:

- ``W8A16``: ``weight`` int8 [out, in], ``weight_scale`` [out] in the model's dtype;
- ``W4A16_AWQ``: ``weight`` uint8 [out / 2, in], the codes of two rows, the first in the low half;
  ``weight_scale`` [out, in / 128] in the model's dtype; ``pre_quant_scale`` [in], what inputs are
  multiplied by: ones, since AWQ's factors are in the layers before. The engine reads them where it
  fuses a linear with no other (``W4A16_AWQ_LinearMethod.load_weights_vanilla``);
- ``W4A8_AWQ``: the same, and ``weight_scale_2`` and ``input_scale``, float32 scalars. The engine
  divides the scales of blocks by the first, multiplies them with the codes, both in half
  precision, and rounds that to E4M3; inputs are E4M3 times the second (``W4A8_AWQ_LinearMethod``).

``hf_quant_config.json`` says which, and names the linears that are left in 16 bits.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch

from post_training.common.safetensors_index import Entry
from post_training.export.folder import Tensors
from post_training.export.layout import Configuration, Layout, exactly, modelopts_configuration

GROUP = 128  # inputs of a row that share a scale in INT4


class ModelOptIntegers(Layout):
    """What both share."""

    algorithm: str

    def whole_scale(self, value: torch.Tensor) -> torch.Tensor:
        """A scalar, which the engine copies into one."""
        return value.reshape(())

    @abstractmethod
    def said(self) -> dict[str, Any]:
        """Of ``hf_quant_config.json``, beside the algorithm's name."""

    def configuration(self, index: Mapping[str, Entry], kv_cache: str) -> Configuration:
        return modelopts_configuration(self.algorithm, index, kv_cache, **self.said())


class W8A16(ModelOptIntegers):
    """A scale for each row."""

    algorithm = "W8A16"

    def stored(
        self, module: str, value: torch.Tensor, steps: torch.Tensor, dtype: torch.dtype
    ) -> Tensors:
        return {
            f"{module}.weight": torch.round(value / steps).to(torch.int8),
            f"{module}.weight_scale": exactly(module, steps[:, 0].contiguous(), dtype),
        }

    def said(self) -> dict[str, Any]:
        return {}


class W4A16Awq(ModelOptIntegers):
    """A scale for 128 inputs of a row."""

    algorithm = "W4A16_AWQ"

    def stored(
        self, module: str, value: torch.Tensor, steps: torch.Tensor, dtype: torch.dtype
    ) -> Tensors:
        codes = torch.round(value / steps).clamp(-8, 7).to(torch.int8) & 0xF
        pairs = codes.to(torch.uint8).unflatten(0, (-1, 2))
        return {
            f"{module}.weight": pairs[:, 0] | pairs[:, 1] << 4,
            f"{module}.weight_scale": exactly(module, steps[:, ::GROUP].contiguous(), dtype),
            f"{module}.pre_quant_scale": torch.ones(value.shape[1], dtype=dtype),
        }

    def said(self) -> dict[str, Any]:
        return {"group_size": GROUP, "has_zero_point": False, "pre_quant_scale": True}


class W4A8Awq(W4A16Awq):
    """A scale for 128 inputs of a row and one for all, and FP8 inputs.

    What the model computes with is rounded to FP8, by less than half a code.
    """

    algorithm = "W4A8_AWQ"


# By quant_algo.
LAYOUTS: dict[str, Layout] = {each.algorithm: each for each in (W8A16(), W4A16Awq(), W4A8Awq())}
