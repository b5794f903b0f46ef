"""The flags of ``auto``, the search for the format of each layer. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from post_training.common.errors import UsageError
from post_training.config.checks import at_least, positive
from post_training.config.flags import flag
from post_training.quantization.formats import exportable
from post_training.quantization.formats import registry as formats
from post_training.quantization.formats.base import FOLDED_METHODS, GPTQ, Format
from post_training.quantization.formats.exportable import Verdict


@dataclass(frozen=True, kw_only=True)
class SensitivityOptions:
    """What is measured of each layer, whatever the limit."""

    TITLE: ClassVar[str] = "mixtures: a format for each layer"

    auto_quantize_formats: tuple[str, ...] = flag(
        ("FP8_DEFAULT_CFG", "NVFP4_DEFAULT_CFG"),
        metavar="NAME",
        help="formats to choose from, as words or separated by commas (FP8_DEFAULT_CFG "
        "NVFP4_DEFAULT_CFG)",
    )
    auto_quantize_method: str = flag(
        "gradient",
        choices=("gradient", "kl_div"),
        help="how sensitivity is measured (%(default)s)",
    )
    auto_quantize_score_size: int = flag(
        128, metavar="N", check=at_least(1), help="sequences to measure it on (%(default)s)"
    )

    @property
    def formats(self) -> list[Format]:
        """The formats to choose from; UsageError for an unknown name."""
        names = [each for word in self.auto_quantize_formats for each in word.split(",") if each]
        return [formats.find(name, "--auto-quantize-formats") for name in names]

    @property
    def smallest(self) -> tuple[float, float]:
        """Bits a weight of the smallest format, with its scales and without."""
        weights = [formats.WEIGHTS[row.linear.weight] for row in self.formats if row.linear]
        least = min(weights, key=lambda each: each.bits, default=None)
        return (least.bits, least.code_bits) if least else (16.0, 16.0)


@dataclass(frozen=True, kw_only=True)
class AutoQuantizeOptions(SensitivityOptions):
    TITLE: ClassVar[str] = "auto: a search for the format of each layer"

    auto_quantize_bits: float = flag(
        4.8,
        metavar="X",
        check=positive,
        help="stored bits per weight of the linear layers, at most, scales included: NVFP4 has "
        "4.5, FP8 8 (%(default)s); beside a format's name it asks for auto",
    )
    auto_quantize_checkpoint: str | None = flag(
        metavar="FILE", help="keep the measurements here; the rank is added to its name"
    )

    @property
    def bits(self) -> float:
        """The limit of bits a weight, scales included.

        One that has room for the codes of the smallest format alone means that format: ModelOpt
        used to count NVFP4 as 4 bits, and Megatron-LM's README asks for 4.0.
        """
        stored, codes = self.smallest
        return stored if codes <= self.auto_quantize_bits < stored else self.auto_quantize_bits


def check(
    auto: AutoQuantizeOptions,
    what: str,
    *,
    kv_cache: str,
    weight_only: bool,
    target: str,
    allow_unexportable: bool,
) -> Verdict:
    """Refuse formats or bits that a search cannot have.

    Args:
        what: names the formats in a message.
        kv_cache: what keys and values are quantized to.
        weight_only: inputs stay in 16 bits.
        target: engine that is to read the export.
        allow_unexportable: formats that no engine reads side by side are let pass.

    Returns:
        What a result that has all the formats is exported as.
    """
    rows = auto.formats
    changing = [row.name for row in rows if row.method in (*FOLDED_METHODS, GPTQ)]
    if changing:
        raise UsageError(
            what,
            f"{', '.join(changing)} changes norms or weights, and a search compares formats on the "
            "same ones",
            "leave it out, or quantize the whole model in it",
        )
    linears = [each for row in rows for each in exportable.linears_of(row, weight_only)]
    attention = any(row.attention for row in rows)
    found = exportable.judge(linears, kv_cache, attention=attention, target=target)
    if not found.exportable and not allow_unexportable:
        raise exportable.unexportable(what, found)
    least, _ = auto.smallest
    if not least <= auto.bits <= 16:
        raise UsageError(
            f"--auto-quantize-bits {auto.auto_quantize_bits}",
            f"these formats need between {least:g} and 16 bits a weight, scales included",
            "give a number in between",
        )
    return found
