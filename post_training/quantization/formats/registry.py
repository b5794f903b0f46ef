"""Every format, by name. No torch, no ModelOpt.

To add one: a file that ends in a ``FormatFamily``, and a row here (docs/extending.md).
"""

from __future__ import annotations

from typing import Any

from post_training.common.errors import UsageError, suggest
from post_training.quantization.engines import registry as engines
from post_training.quantization.formats.base import Format, FormatFamily, KvCache, NumberFormat
from post_training.quantization.formats.fp8 import FP8
from post_training.quantization.formats.integer import INTEGER
from post_training.quantization.formats.kv_cache import KEYS_AND_VALUES
from post_training.quantization.formats.mx import MX
from post_training.quantization.formats.nvfp4 import NVFP4

# In the order of the table.
FAMILIES: tuple[FormatFamily, ...] = (
    FP8,
    NVFP4,
    MX,
    INTEGER,
    KEYS_AND_VALUES,
)

AUTO = "auto"
AUTO_NAMES = (AUTO, "AUTO", "auto_quantize")  # as Megatron-LM's script spells it
DEFAULT = "FP8_DEFAULT_CFG"

FORMATS: dict[str, Format] = {row.name: row for family in FAMILIES for row in family.formats}
WEIGHTS: dict[str, NumberFormat] = {row.name: row for family in FAMILIES for row in family.weights}
INPUTS: dict[str, NumberFormat] = {row.name: row for family in FAMILIES for row in family.inputs}
KV_CACHES: dict[str, KvCache] = {row.name: row for family in FAMILIES for row in family.kv_caches}


def find(name: str, option: str = "--export-quant-cfg") -> Format:
    """The format of a name in any spelling, upper or lower case.

    Raises:
        UsageError: naming the nearest ones.
    """
    spellings = {
        spelling: row for row in FORMATS.values() for spelling in (row.name, *row.spellings)
    }
    by_lower = {spelling.lower(): row for spelling, row in spellings.items()}
    key = name.lower()
    row = by_lower.get(key) or by_lower.get(f"{key}_cfg")
    if row is None:
        raise UsageError(
            f"{option} {name}",
            f"no quantization format has this name; there are {len(FORMATS)}, {AUTO}, and recipes",
            suggest(name, [*spellings, AUTO])
            or f"for instance {DEFAULT}; docs/formats.md has the table",
        )
    return row


def number_format(quantizer: Any, *, is_input: bool = False) -> NumberFormat | None:
    """The number format that a ModelOpt ``TensorQuantizer`` rounds to; None if none matches.

    Args:
        is_input: of a layer's input, which may have formats that no weight has.
    """
    candidates = (*INPUTS.values(), *WEIGHTS.values()) if is_input else WEIGHTS.values()
    return next((row for row in candidates if row.is_used_by(quantizer)), None)


def packs_rounded(weight: str) -> bool:
    """Whether ``--compress`` divides weights of this number format by scales in their own dtype."""
    found = WEIGHTS.get(weight)
    return (
        found is not None
        and found.scale in ("channel", "block")
        and found.blocks.get("scale_bits") is None
    )


def packs_by_rank(weight: str) -> bool:
    """Whether ``--compress`` saves a scale of each rank's part of a row."""
    found = WEIGHTS.get(weight)
    return found is not None and (found.scale == "channel" or found.bf16_scales)


def of_weights_alone() -> frozenset[str]:
    """Every ``quant_algo`` of weights whose inputs stay in 16 bits."""
    found = {each.exported_as[""] for each in WEIGHTS.values() if "" in each.exported_as}
    own = {engines.stored_as(name, target) for name in found for target in engines.TARGETS}
    return frozenset(found | own)
