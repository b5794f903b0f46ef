"""Quantization formats: their names, what they do to a model, and what they are exported as.

One file a family of number formats (``fp8``, ``nvfp4``, ``mx``, ``integer``, ``kv_cache``) holds
every fact about it; ``registry`` lists the families, ``exportable`` decides what engines read
(``quantization/engines``), ``table`` writes docs/formats.md. Nothing here imports torch or
ModelOpt: the command line is checked before they are loaded.
"""

from post_training.quantization.formats.base import Format, Linear, Verdict
from post_training.quantization.formats.exportable import judge, unexportable, verdict
from post_training.quantization.formats.registry import (
    AUTO,
    DEFAULT,
    FORMATS,
    KV_CACHES,
    WEIGHTS,
    find,
    is_recipe,
    number_format,
)
from post_training.quantization.formats.table import markdown_table

# Views of the registries, for the checks of the command line.
WEIGHT_BITS = {name: row.bits for name, row in WEIGHTS.items()}
BLOCK_SIZES = {name: row.block_size for name, row in WEIGHTS.items()}
STATIC_BLOCKS = frozenset(name for name, row in WEIGHTS.items() if row.stored_block_scales)
# Value of --export-kv-cache-quant -> ModelOpt's configuration, name of the number format.
KV_CACHE = {"none": ("", ""), **{name: (row.config, name) for name, row in KV_CACHES.items()}}

__all__ = [
    "AUTO",
    "BLOCK_SIZES",
    "DEFAULT",
    "FORMATS",
    "KV_CACHE",
    "KV_CACHES",
    "STATIC_BLOCKS",
    "WEIGHTS",
    "WEIGHT_BITS",
    "Format",
    "Linear",
    "Verdict",
    "find",
    "is_recipe",
    "judge",
    "markdown_table",
    "number_format",
    "unexportable",
    "verdict",
]
