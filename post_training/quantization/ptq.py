"""Quantize a model after training (PTQ) as the options say: by one configuration, or by a search.

Quantizers are placed, refused where no engine would read the export, calibrated, and checked for
usable scales, in this order: what cannot work fails before the data runs through the model.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from post_training.quantization import auto, calibration, coverage, formats, quantizers
from post_training.quantization.formats import Format, Verdict
from post_training.quantization.options import Choice, QuantizeOptions, is_search
from post_training.quantization.recipes import Recipe

if TYPE_CHECKING:
    from megatron.core.transformer import MegatronModule

    from post_training.quantization.calibration import Calibration
    from post_training.quantization.coverage_report import Coverage
    from post_training.quantization.quantizers import Config

logger = logging.getLogger("post_training")


@dataclass(frozen=True)
class PtqResult:
    """What quantization did.

    Attributes:
        config: ModelOpt's; after a search, of keys and values only.
        reached: what is quantized and what is not.
        found: what the model can be exported as.
        search: ModelOpt's summary of a search.
    """

    config: Config
    reached: Coverage
    found: Verdict
    search: dict[str, Any] | None = None


def quantize(
    model: MegatronModule, options: QuantizeOptions, choice: Choice, data: Calibration
) -> PtqResult:
    """Quantize ``model`` in place; a collective call.

    Args:
        choice: from :func:`post_training.quantization.options.chosen`.

    Raises:
        UsageError: if the result cannot be exported, or a weight that the format matches has no
            scale.
    """
    search = None
    if isinstance(choice, str) or is_search(choice):
        config, search = search_formats(model, options, choice, data)
        reached = coverage.survey(model, None)
        found = quantizers.judge_model(model)
    else:
        config = with_format(model, options, choice, data)
        reached = coverage.survey(model, config)
        found = quantizers.judge_model(model, quantizers.method_of(config))
    if not found.exportable:
        if not options.allow_unexportable:
            raise formats.unexportable("the quantized model", found)
        logger.warning("export will refuse this checkpoint: %s", found.reason)
    if options.packed:
        quantizers.compress(model)
    return PtqResult(config, reached, found, search)


def with_format(
    model: MegatronModule, options: QuantizeOptions, choice: Format | Recipe, data: Calibration
) -> Config:
    """Quantize by one configuration and calibrate. Returns the configuration."""
    config = quantizers.configuration(
        choice,
        weight_only=options.weight_only,
        disable_qkv=options.disable_qkv_quant,
        kv_cache=options.export_kv_cache_quant,
    )
    if options.sync_expert_weight_amax:
        config["algorithm"] = quantizers.with_option(
            config["algorithm"], "sync_expert_weight_amax", True
        )
    quantizers.insert(model, config)
    coverage.survey(model, config)
    if not options.allow_unexportable:
        quantizers.require_exportable(model, quantizers.method_of(config))
    quantizers.require_savable(model)
    with calibration.watching(model) as seen:
        quantizers.calibrate(model, config, data if quantizers.needs_data(model, config) else None)
    rows = data.probe(model, seen)
    coverage.check_scales(model, rows, dynamic_inputs=not quantizers.method_of(config))
    return config


def search_formats(
    model: MegatronModule, options: QuantizeOptions, choice: Choice, data: Calibration
) -> tuple[Config, dict[str, Any]]:
    """Search a format for each layer. Returns the KV configuration and what was found."""
    wanted = options.auto
    kept = Path(wanted.auto_quantize_checkpoint) if wanted.auto_quantize_checkpoint else None
    cache = formats.KV_CACHE[options.export_kv_cache_quant][0]
    kv_entries = quantizers.cache_entries(cache) if cache else []
    if isinstance(choice, Recipe):
        search, of_recipe = auto.from_recipe(choice, kept)
        kv_entries = kv_entries or of_recipe or []
    else:
        qkv = tuple(pattern.removesuffix(".*") for pattern in quantizers.QKV_PATTERNS)
        search = auto.AutoQuantizeSearch(
            bits=wanted.auto_quantize_bits,
            formats=tuple(wanted.auto_quantize_formats.split(",")),
            method=wanted.auto_quantize_method,
            score_size=wanted.auto_quantize_score_size,
            checkpoint=kept,
            disabled=qkv if options.disable_qkv_quant else (),
        )
    found = auto.run(model, search, data, kv_entries)
    if options.weight_only:
        quantizers.disable_inputs(model)
    coverage.check_scales(model, data.probe(model))
    return {"quant_cfg": kv_entries, "algorithm": "auto_quantize"}, found
