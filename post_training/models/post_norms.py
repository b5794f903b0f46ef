"""Norms of what attention and MLP give, before it is added to the residual.

GLM-4-0414 and Gemma 3 have them beside the norms before attention and MLP, OLMo 2 in their place.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.post_training.modelopt.layers import Norm
from megatron.core.transformer.identity_op import IdentityOp

# Attribute of a layer, as transformers names it -> the part whose output it normalizes.
NORMS = {"post_self_attn_layernorm": "self_attention", "post_mlp_layernorm": "mlp"}


def attach(model: Any) -> None:
    """Add the norms to the layers of ``model``, this rank's part, their weights uninitialized."""
    config = model.config
    for layer in model.decoder.layers:
        for name, part in NORMS.items():
            norm = Norm(config, config.hidden_size, eps=config.layernorm_epsilon)
            layer.add_module(name, norm)
            getattr(layer, part).register_forward_hook(partial(_normalize, norm))


def without_pre_norms(block: Any) -> None:
    """Change the layer specs of ``block``: attention and MLP get what the residual is."""
    for layer in block.layer_specs:
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = IdentityOp


def of(layer: Any) -> dict[str, torch.nn.Module]:
    """The norms that :func:`attach` gave a layer, by name."""
    return {name: getattr(layer, name) for name in NORMS if hasattr(layer, name)}


def _normalize(
    norm: torch.nn.Module, _module: Any, _inputs: Any, output: tuple[torch.Tensor, Any]
) -> tuple[torch.Tensor, None]:
    result, bias = output
    return norm(result if bias is None else result + bias), None
