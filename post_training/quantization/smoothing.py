"""SmoothQuant and AWQ, restricted to the layers whose factors fold into the norm before them.

Both divide the weights' input channels by factors and multiply the layer's input by them
(``pre_quant_scale``), which no engine does. Where the input is a norm's output, and nothing else
reads it, the norm's own weight takes the factors: the model then computes the same without them.
Elsewhere (attention output, second layer of the MLP, experts) nothing is searched, and the scales
are those of plain calibration, or where AWQ is asked to clip (``awq_clip``, ``awq_full``), smaller
maxima with which the layer's outputs differ less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from megatron.core.transformer import MegatronModule
from modelopt.torch.quantization.config import AWQClipCalibConfig, AWQLiteCalibConfig

from post_training.common.errors import UsageError
from post_training.distributed.collectives import from_all_ranks
from post_training.quantization.formats.registry import number_format

_STATIC = {"type": "static", "block_sizes": None}
_OF_TOKENS = {"type": "dynamic", "block_sizes": {-1: None}}


def calibrate(
    model: MegatronModule,
    algorithm: Any,
    method: str,
    forward_loop: Callable[[torch.nn.Module], None],
) -> None:
    """Search factors where they fold, fold them, and calibrate all scales; a collective call.

    Args:
        algorithm: ModelOpt's configuration of ``method``.
        method: ``smoothquant``, ``awq_lite`` or ``awq_full``.
        forward_loop: runs the calibration data once; called two or three times.
    """
    search, scales = _parts(algorithm, method)
    kind, pairs = _kind(method), _taking_part(model, method)
    taking_part = {id(linear) for _, linear in pairs}
    others = [
        quantizer
        for module in model.modules()
        if id(module) not in taking_part
        and (quantizer := getattr(module, kind, None)) is not None
        and quantizer.is_enabled
    ]
    tokens = list(_of_tokens(model))
    if method != "smoothquant":
        others += tokens
    else:  # needs the largest input of each channel
        for quantizer in tokens:
            quantizer.set_from_attribute_config(_STATIC)
    for quantizer in others:
        quantizer.disable()
    try:
        mtq.calibrate(model, search, forward_loop=forward_loop)
    finally:
        for quantizer in others:
            quantizer.enable()
    for norm, linear in pairs:
        _fold(norm, linear)
    if method == "smoothquant":
        for quantizer in tokens:
            quantizer.reset_amax()
            quantizer.set_from_attribute_config(_OF_TOKENS)
    # Of the model as it is now: rounded factors, and inputs that were not looked at yet.
    mtq.calibrate(model, scales, forward_loop=forward_loop)


def require_pairs(model: MegatronModule, method: str) -> None:
    """Raise UsageError, on every rank, if no layer of the model can take part."""
    if not sum(from_all_ranks(len(_taking_part(model, method)))):
        raise UsageError(
            f"the calibration method {method}",
            "it scales the outputs of norms, and no linear layer after a norm of its own has a "
            f"{_kind(method).replace('_', ' ')}",
            "build the model with ModelOpt's layer spec (no --export-default-te-spec), and leave "
            "these layers and their inputs quantized; or choose a format with max calibration",
        )


def _kind(method: str) -> str:
    """The quantizer without which the method passes by a layer."""
    return "input_quantizer" if method == "smoothquant" else "weight_quantizer"


def _taking_part(model: MegatronModule, method: str) -> list[tuple[Any, Any]]:
    return [pair for pair in _pairs(model) if getattr(pair[1], _kind(method)).is_enabled]


def _parts(algorithm: Any, method: str) -> tuple[Any, Any]:
    """The configurations that search factors, and those that find the scales afterwards."""
    if method != "awq_full":
        return algorithm, "max"
    given = algorithm if isinstance(algorithm, dict) else {}
    kinds = {"awq_lite": AWQLiteCalibConfig, "awq_clip": AWQClipCalibConfig}
    lite, clip = (
        {**{k: v for k, v in given.items() if k in kind.model_fields}, "method": name}
        for name, kind in kinds.items()
    )
    return lite, clip


def _of_tokens(model: MegatronModule) -> Iterator[Any]:
    """Enabled quantizers of inputs with a scale a token, which have no maximum for a search."""
    for module in model.modules():
        quantizer = getattr(module, "input_quantizer", None)
        if quantizer is not None and quantizer.is_enabled:
            found = number_format(quantizer, is_input=True)
            if found is not None and found.scale == "token":
                yield quantizer


def _pairs(model: MegatronModule) -> Iterator[tuple[Any, Any]]:
    """Each norm whose output goes into one linear layer alone, and that layer."""
    decoder: Any = model.decoder
    if model.config.apply_residual_connection_post_layernorm:
        return
    for layer in decoder.layers:
        attention, mlp = getattr(layer, "self_attention", None), getattr(layer, "mlp", None)
        for norm, linear in (
            (getattr(layer, "input_layernorm", None), getattr(attention, "linear_qkv", None)),
            (getattr(layer, "pre_mlp_layernorm", None), getattr(mlp, "linear_fc1", None)),
        ):
            has_norm = isinstance(getattr(norm, "weight", None), torch.Tensor)
            if has_norm and hasattr(linear, "weight_quantizer"):
                yield norm, linear


@torch.no_grad()
def _fold(norm: Any, linear: Any) -> None:
    """Let the norm multiply by the factors of the layer after it."""
    quantizer = linear.input_quantizer
    factors = quantizer._pre_quant_scale.float().reshape(-1)
    # Some norms store their weight less one.
    offset = 1.0 if linear.config.layernorm_zero_centered_gamma else 0.0
    norm.weight.copy_((norm.weight.float() + offset) * factors - offset)
    if getattr(norm, "bias", None) is not None:
        norm.bias.copy_(norm.bias.float() * factors)
    del quantizer._pre_quant_scale
    quantizer._enable_pre_quant_scale = False
    if hasattr(quantizer, "_amax_for_smoothing"):
        del quantizer._amax_for_smoothing
