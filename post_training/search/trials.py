"""One thing that a search tries. No torch.

A trial is what a command line of quantize.sh asks for, so that its result can be made.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path

from post_training.config.options import StageOptions
from post_training.inference.smoke_generation import SmokeOptions
from post_training.quantization import options as quantization_options
from post_training.quantization.formats import registry as formats
from post_training.quantization.formats.base import NO_KV_CACHE
from post_training.quantization.options import Choice, QuantizeOptions
from post_training.quantization.search_options import AutoQuantizeOptions
from post_training.search.options import SearchOptions


@dataclass(frozen=True)
class Trial:
    """One way to quantize a model.

    Attributes:
        formats: names of one format, or of those that a mixture chooses from.
        bits: most stored bits per weight of a mixture; None: the one format everywhere.
        kv_cache: of keys and values.
        model: one of ``--also``; empty for the stage's own.
    """

    formats: tuple[str, ...]
    bits: float | None = None
    kv_cache: str = NO_KV_CACHE
    model: str = ""

    @property
    def name(self) -> str:
        """Of its folder: letters, digits and ``-+._``."""
        return self._named("" if self.bits is None else f"-{self.bits:g}")

    @property
    def kind(self) -> str:
        """Its name without the number of bits."""
        return self._named("")

    def _named(self, bits: str) -> str:
        first = formats.FORMATS[self.formats[0]].spellings[0]
        whole = f"{first}-or-16" if len(self.formats) == 1 else "mix"
        parts = [first if self.bits is None else whole + bits]
        parts += [f"kv-{self.kv_cache}"] if self.kv_cache != NO_KV_CACHE else []
        parts += [re.sub(r"[^\w.-]", "-", Path(self.model).name)] if self.model else []
        return "+".join(parts)

    @property
    def choice(self) -> Choice:
        return formats.AUTO if self.bits is not None else formats.FORMATS[self.formats[0]]

    @property
    def least_bits(self) -> float:
        """Stored bits per weight of its linears, at least."""
        if self.bits is not None:
            return self.bits
        return formats.WEIGHTS[formats.FORMATS[self.formats[0]].weight].bits

    @property
    def layers(self) -> str:
        """That it quantizes, as a format says it."""
        return "all" if self.bits is not None else formats.FORMATS[self.formats[0]].layers

    def options(self, search: SearchOptions, checkpoint: Path | None = None) -> QuantizeOptions:
        """The options of quantize.sh that ask for it.

        Args:
            checkpoint: where a mixture's sensitivities are kept.
        """
        shared = {each.name: getattr(search, each.name) for each in fields(StageOptions)}
        auto = AutoQuantizeOptions()
        if self.bits is not None:
            auto = AutoQuantizeOptions(
                auto_quantize_bits=self.bits,
                auto_quantize_formats=self.formats,
                auto_quantize_method=search.mixtures.auto_quantize_method,
                auto_quantize_score_size=search.mixtures.auto_quantize_score_size,
                auto_quantize_checkpoint=str(checkpoint) if checkpoint else None,
            )
        return QuantizeOptions(
            **shared,
            export_quant_cfg=quantization_options.name_of(self.choice),
            export_kv_cache_quant=self.kv_cache,
            leave_out=search.leave_out,
            target=search.target,
            calibration=search.calibration,
            experts=search.experts,
            auto=auto,
            smoke=SmokeOptions(),
        )
