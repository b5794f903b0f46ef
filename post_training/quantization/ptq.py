"""Quantize a model after training (PTQ) as the options say: by one configuration, or by a search.

Quantizers are placed, refused where no engine would read the export, calibrated, and checked for
usable scales, in this order: what cannot work fails before the data runs through the model.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import modelopt.torch.quantization as mtq
from megatron.core.transformer import MegatronModule
from modelopt.torch.opt.conversion import apply_mode
from modelopt.torch.quantization.mode import QuantizeModeRegistry

from post_training.common.quiet import quiet
from post_training.distributed.collectives import from_all_ranks
from post_training.quantization import (
    auto,
    calibration,
    coverage,
    gptq,
    leaving_out,
    model_checks,
    packing,
    quantizers,
    ranges,
    row_blocks,
    scale_rounding,
    smoothing,
)
from post_training.quantization.calibration import Calibration
from post_training.quantization.configuration import Config, configuration, method_of
from post_training.quantization.coverage import Coverage
from post_training.quantization.formats.base import FOLDED_METHODS, GPTQ, Format
from post_training.quantization.formats.exportable import Verdict
from post_training.quantization.options import Choice, QuantizeOptions, is_search
from post_training.quantization.recipes import Recipe

logger = logging.getLogger("post_training")


@dataclass(frozen=True)
class PtqResult:
    """What quantization did.

    Attributes:
        config: ModelOpt's; after a search, of keys and values only.
        reached: what is quantized and what is not.
        found: what the model can be exported as.
        ranges: largest magnitudes by linear layer.
        search: ModelOpt's summary of a search.
    """

    config: Config
    reached: Coverage
    found: Verdict
    ranges: dict[str, dict[str, float]]
    search: dict[str, Any] | None = None

    def metrics(self) -> dict[str, Any]:
        """For the manifest."""
        found = {"coverage": self.reached.to_json(), "ranges": self.ranges}
        return {**found, "search": self.search} if self.search else found


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
        config, search = auto.search(model, options, choice, data)
        quantizers.require_savable(model, packed=options.packed)
        row_blocks.share_maxima(model)
        calibration.settle_zeros(model)
        scale_rounding.round_scales(model)
        calibration.check_scales(model, data.probe(model))
    else:
        config = with_format(model, options, choice, data)
    left_out = options.asked_to_leave_out
    reached = coverage.survey(model, None if search else config, left_out)
    found = quantizers.judge_model(
        model,
        method_of(config),
        required=not options.allow_unexportable,
        target=options.target,
    )
    if not found.exportable:
        logger.warning("export will refuse this checkpoint: %s", found.reason)
    of_layers = ranges.of_model(model)  # before the weights become codes
    if options.packed:
        packing.pack(model)
    return PtqResult(config, reached, found, of_layers, search)


def with_format(
    model: MegatronModule, options: QuantizeOptions, choice: Format | Recipe, data: Calibration
) -> Config:
    """Quantize by one configuration and calibrate. Returns the configuration."""
    config = prepare(model, options, choice, data)
    with_scales(model, config, data)
    return config


def prepare(
    model: MegatronModule, options: QuantizeOptions, choice: Format | Recipe, data: Calibration
) -> Config:
    """Place the quantizers of one configuration, and refuse what cannot work. Returns it.

    The weights are not looked at: they may be on the meta device.
    """
    config = configuration(options, choice)
    left_out = options.asked_to_leave_out
    names = leaving_out.local_names(model, left_out)
    config["quant_cfg"] += [{"quantizer_name": f"{name}.*", "enable": False} for name in names]
    method = method_of(config)
    # Of a recipe nothing else has looked at it.
    model_checks.check_clipping(f"the method {method}", method, model.config.num_moe_experts)
    data.expert_share = _expert_share(options, config)
    data.only_maxima = method == "max"
    with quiet(stdout=True):
        # Not mtq.quantize: it checks that a weight quantizer is enabled on its own rank, and would
        # leave the others waiting. The survey asks all of them.
        apply_mode(model, [("quantize", {**config, "algorithm": None})], QuantizeModeRegistry)
        mtq.calibrate(model, None)
    coverage.survey(model, config, left_out)
    quantizers.judge_model(
        model, method, required=not options.allow_unexportable, target=options.target
    )
    quantizers.require_savable(model, packed=options.packed)
    if method in FOLDED_METHODS:
        smoothing.require_pairs(model, method)
    return config


def with_scales(model: MegatronModule, config: Config, data: Calibration) -> None:
    """Find the scales of a model, or of a part of one, that :func:`prepare` placed quantizers in.

    Raises:
        UsageError: if a weight that the format matches has no scale.
    """
    method = method_of(config)
    with calibration.watching(model) as seen:
        forward_loop = data if needs_data(model, method) else None
        if method:
            with quiet(stdout=True):
                if method in FOLDED_METHODS:
                    smoothing.calibrate(model, config["algorithm"], method, data)
                elif method == GPTQ:
                    gptq.calibrate(model, data, data if needs_data(model, "max") else None)
                else:
                    mtq.calibrate(model, config["algorithm"], forward_loop=forward_loop)
    row_blocks.share_maxima(model)
    calibration.settle_zeros(model)
    scale_rounding.round_scales(model)
    calibration.check_scales(model, data.probe(model, seen), dynamic_inputs=not method)


def _expert_share(options: QuantizeOptions, config: Config) -> float:
    """Of a layer's experts, that a token reaches: by the flag, else as a recipe has it."""
    algorithm = config["algorithm"]
    if "moe_calibrate" in options.given or not isinstance(algorithm, dict):
        return options.experts.share
    return float(algorithm.get("moe_calib_experts_ratio") or options.experts.share)


def needs_data(model: MegatronModule, method: str) -> bool:
    """Whether calibration looks at data; the same answer on all ranks."""
    if method != "max":
        return bool(method)
    wanted = any(
        quantizers.needs_amax(quantizer) and "weight_quantizer" not in name
        for name, quantizer in quantizers.enabled(model)
    )
    return any(from_all_ranks(wanted))
