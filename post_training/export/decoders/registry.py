"""Every decoder, by ``quant_algo``.

To add one: a file that ends in its ``Decoder`` rows, and a row here (docs/extending.md).
"""

from __future__ import annotations

from post_training.export.decoders.base import Decoder
from post_training.export.decoders.compressed_tensors import COMPRESSED_TENSORS
from post_training.export.decoders.fp8 import FP8
from post_training.export.decoders.modelopt_integers import MODELOPT_INTEGERS
from post_training.export.decoders.mx import MX
from post_training.export.decoders.nvfp4 import NVFP4

_ROWS: tuple[Decoder, ...] = (
    *FP8,
    *NVFP4,
    *MX,
    *COMPRESSED_TENSORS,
    *MODELOPT_INTEGERS,
)

DECODERS: dict[str, Decoder] = {row.algorithm: row for row in _ROWS}
# Names of tensors that may stand beside a quantized weight.
SCALES = frozenset(name for row in _ROWS for name in row.scales)
