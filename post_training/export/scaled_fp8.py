"""FP8 weights with a scale for each row, or for each block of 128 x 128, in ModelOpt's layout.

Each linear of the Hugging Face model has tensors of its own, q, k, v and gate, up apart:
``weight`` E4M3 [out, in], and ``weight_scale`` float32, [out] or [out / 128, 1, in / 128, 1].
Engines find the scales of inputs at run time. ``hf_quant_config.json`` says which of the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from post_training.common.errors import UsageError
from post_training.common.safetensors_index import Entry
from post_training.export.folder import Tensors
from post_training.export.layout import Configuration, Layout, modelopts_configuration

_LARGEST = 448.0  # of E4M3


@dataclass(frozen=True)
class ScaledFp8(Layout):
    """A scale for each row, or each block.

    Attributes:
        algorithm: ``quant_algo``.
        block: rows and columns that share a scale; None: a whole row.
    """

    algorithm: str
    block: int | None = None

    def stored(
        self, module: str, value: torch.Tensor, steps: torch.Tensor, dtype: torch.dtype
    ) -> Tensors:
        # Each value is a code times its step but for two roundings, far less than half a code.
        codes = (value / steps).clamp_(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
        scale = self._scales(module, steps)
        return {f"{module}.weight": codes, f"{module}.weight_scale": scale}

    def _scales(self, module: str, steps: torch.Tensor) -> torch.Tensor:
        if self.block is None:
            return steps[:, 0].contiguous()
        blocks = steps.unflatten(1, (-1, self.block)).unflatten(0, (-1, self.block))
        scales = blocks[:, :1, :, :1].contiguous()
        if not torch.equal(scales.expand_as(blocks), blocks):
            raise UsageError(
                f"the scales of {module}",
                f"they differ within blocks of {self.block} x {self.block}",
                "quantize the model again with this version",
            )
        return scales

    def configuration(self, index: Mapping[str, Entry], kv_cache: str) -> Configuration:
        return modelopts_configuration(self.algorithm, index, kv_cache)


# By quant_algo.
LAYOUTS: dict[str, Layout] = {
    each.algorithm: each
    for each in (ScaledFp8("FP8_PER_CHANNEL_PER_TOKEN"), ScaledFp8("FP8_PB_WO", block=128))
}
