"""What cannot be quantized because of the model, whatever its sizes. No torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from post_training.checkpoints.source import Source
from post_training.common.errors import UsageError
from post_training.models.architecture import Architecture
from post_training.models.families import registry as families
from post_training.quantization.formats import exportable
from post_training.quantization.formats.base import FOLDED_METHODS, GPTQ, NO_KV_CACHE
from post_training.quantization.formats.exportable import Verdict


def check_state(source: Source, what: str) -> None:
    """Raise UsageError for a checkpoint that is quantized, or has a draft.

    Args:
        what: names it in a message.
    """
    recorded = source.manifest or {}
    if quantized := recorded.get("quantization"):
        raise UsageError(
            what,
            f"it is already quantized: {quantized.get('format')}",
            "quantize the checkpoint that convert.sh made",
        )
    if recorded.get("draft"):
        raise UsageError(
            what,
            "it has a draft, which calibration does not run and quantization would round too",
            "quantize the checkpoint of before, and attach the draft to the quantized one "
            "(eagle3.sh, or convert.sh with --draft-model-path)",
        )


def check(
    architecture: Architecture,
    what: str,
    kv_caches: Mapping[str, str],
    allow_unexportable: bool,
    *,
    method: str,
    weights: Collection[str] | None,
) -> None:
    """Raise UsageError for a model that no engine reads quantized, or not as asked.

    Args:
        what: the format, in a message.
        kv_caches: how keys and values are to be quantized, by the flag that says so.
        method: of calibration; empty where the format does not say it.
        weights: number formats that weights may get; None: a recipe says it.
    """
    family = families.family_of(architecture)
    reason = family.not_quantized
    if family.weights_read and (weights is None or not set(weights) <= {*family.weights_read}):
        known = " and ".join(family.weights_read)
        reason = f"{family.weights_reason}; weights in {known} are read, by a format's name"
    if reason and not allow_unexportable:
        raise exportable.unexportable(what, Verdict(reason=reason))
    if (recurrent := architecture.recurrent_layers) and method in (*FOLDED_METHODS, GPTQ):
        raise UsageError(
            what,
            f"the method {method} was not tried on the projections of {recurrent}",
            "choose a format that rounds to nearest, such as FP8_DEFAULT_CFG or NVFP4_DEFAULT_CFG",
        )
    if method in FOLDED_METHODS and not architecture.pre_norms:
        raise UsageError(
            what,
            f"{method} folds its factors into norms, and these layers have no norm before them",
            "choose a format that rounds to nearest, such as FP8_DEFAULT_CFG or NVFP4_DEFAULT_CFG",
        )
    if not architecture.multi_latent_attention:
        return
    if method == GPTQ:
        raise UsageError(
            what,
            "GPTQ was not tried on models with multi-latent attention",
            "choose INT4_BLOCKWISE_WEIGHT_ONLY_CFG or INT8_WEIGHT_ONLY_CFG",
        )
    for flag, form in kv_caches.items():
        if form != NO_KV_CACHE:
            raise UsageError(
                f"{flag} with multi-latent attention",
                "engines keep the latents of keys and values, not keys and values, and ModelOpt "
                "finds no scales for them",
                "leave keys and values in 16 bits",
            )


def check_clipping(what: str, method: str, experts: int | None) -> None:
    """Raise UsageError for AWQ's search of clipped maxima in a model with experts.

    Args:
        what: the format or recipe, in the message.
        method: of calibration; several are joined by ``+``.
        experts: of a layer; 0 or None: none.
    """
    if experts and {"awq_clip", "awq_full"} & set(method.split("+")):
        raise UsageError(
            what,
            f"ModelOpt's {method} fails at an expert that gets no token of a batch",
            "choose a format with awq_lite or GPTQ, such as INT4_AWQ_CFG or INT4_GPTQ_CFG",
        )
