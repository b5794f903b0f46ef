"""ModelOpt's search for the format of each layer under a limit of bits (``auto``).

Layers that an engine fuses (q, k and v; gate and up) are one linear in Megatron, so they share a
format by construction. Every stage of a pipeline would search alone: PP=1 is required.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.opt.conversion import ModeloptStateManager
from modelopt.torch.quantization.config import QuantizeConfig

from post_training.common.quiet import quiet
from post_training.inference import forward
from post_training.quantization import formats, quantizers, recipes
from post_training.quantization.recipes import Recipe

if TYPE_CHECKING:
    from post_training.quantization.calibration import Calibration

# By module name, because the search looks at one layer at a time and not at a recipe's patterns.
_NEVER = ("*output_layer*", "*router*", "*lm_head*", "*mlp.gate.*", "*shared_expert_gate*")


@dataclass(frozen=True)
class AutoQuantizeSearch:
    """What to search.

    Attributes:
        bits: stored bits per weight of the linear layers, at most.
        formats: names of the table, or ModelOpt configurations of a recipe.
        method: ``gradient`` (Taylor expansion of the loss, needs a backward pass) or ``kl_div``
            (divergence of the logits, one forward pass a layer and format).
        score_size: sequences that the sensitivity is measured on.
        checkpoint: file that keeps the measured sensitivities, to resume from; None: none.
        disabled: further patterns of modules that stay plain.
        more: further arguments for ModelOpt, from a recipe.
    """

    bits: float
    formats: tuple[Any, ...]
    method: str = "gradient"
    score_size: int = 128
    checkpoint: Path | None = None
    disabled: tuple[str, ...] = ()
    more: tuple[tuple[str, Any], ...] = ()


def from_recipe(recipe: Recipe, checkpoint: Path | None) -> tuple[AutoQuantizeSearch, Any]:
    """The search that a recipe of type ``auto_quantize`` describes, and its KV entries or None."""
    loaded = recipes.load(recipe)
    content = loaded.auto_quantize
    more: dict[str, Any] = {}
    if loaded.quantize is not None:
        more["fixed_quantization_config"] = loaded.quantize.model_dump(exclude_unset=True)
    if content.module_search_spaces:
        more["module_search_spaces"] = [
            {
                "module_name_patterns": list(space.module_name_patterns),
                "quantization_formats": [
                    each.model_dump(exclude_unset=True) for each in space.candidate_formats
                ],
                "allow_no_quant": space.allow_no_quant,
            }
            for space in content.module_search_spaces
        ]
    cache = content.kv_cache
    search = AutoQuantizeSearch(
        bits=content.constraints.effective_bits,
        formats=tuple(each.model_dump(exclude_unset=True) for each in content.candidate_formats),
        method=content.auto_quantize_method,
        score_size=content.score_size,
        checkpoint=checkpoint,
        disabled=tuple(content.disabled_layers),
        more=tuple(more.items()),
    )
    return search, None if cache is None else cache.model_dump(exclude_unset=True)["quant_cfg"]


def run(
    model: torch.nn.Module,
    search: AutoQuantizeSearch,
    calibration: Calibration,
    kv_entries: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """Search, quantize and calibrate ``model`` in place; a collective call.

    Args:
        kv_entries: of a configuration for keys and values, applied to the result.

    Returns:
        The search's own summary: bits and formats by layer.
    """
    core = forward.unwrap(model)
    batches = calibration.batches()
    per_batch = calibration.batch_size
    options: dict[str, Any] = {
        "constraints": {"effective_bits": search.bits},
        "data_loader": batches,
        "forward_step": _forward_logits if search.method == "kl_div" else _forward_loss,
        "disabled_layers": [*_NEVER, *search.disabled],
        "num_calib_steps": len(batches),
        "num_score_steps": max(1, min(len(batches), search.score_size // per_batch)),
        "verbose": False,
        "method": search.method,
        "checkpoint": None if search.checkpoint is None else str(search.checkpoint),
        **dict(search.more),
    }
    if search.formats:
        options["quantization_formats"] = [_configuration(each) for each in search.formats]
    if search.method == "gradient":
        options["loss_func"] = _mean
    with quiet(stdout=True):
        _, state = mtq.auto_quantize(core, **options)
    if kv_entries:
        entries = [dict(quantizers.ALL_OFF), *kv_entries]
        mtq.set_quantizer_by_cfg(core, list(kv_entries))
        with quiet(stdout=True), mtq.set_quantizer_by_cfg_context(core, entries):
            mtq.calibrate(core, "max", forward_loop=calibration)
    _record_all_off(core)
    # The search runs backward passes; nothing later needs what they leave.
    core.zero_grad(set_to_none=True)
    core.eval()
    best = state["best"]
    return {
        "effective_bits": float(best["constraints"]["effective_bits"]),
        "satisfied": bool(best.get("is_satisfied", True)),
        "layers": {
            name.removesuffix(".quant_recipe"): str(v) for name, v in best["recipe"].items()
        },
    }


def _record_all_off(core: torch.nn.Module) -> None:
    """Let a checkpoint start from quantizers that are off.

    ModelOpt records its default, INT8, as the configuration of a search. Loading first applies
    that, then each layer's own state; an output layer that is off has none, and would be INT8.
    """
    off = QuantizeConfig(quant_cfg=[dict(quantizers.ALL_OFF)]).model_dump()
    for mode, state in ModeloptStateManager(core).state_dict():
        if mode == "auto_quantize":
            state["config"] = off


def _configuration(choice: Any) -> Any:
    """ModelOpt knows its own configurations by their names, which then show in the result."""
    if not isinstance(choice, str):
        return choice
    row = formats.find(choice)
    return quantizers.named(row.name) if row.quant_cfg else row.name


def _forward_loss(model: Any, input_ids: torch.Tensor) -> torch.Tensor:
    """Loss of each next token, float32 [b, s]; the last position predicts itself and is cut."""
    input_ids = input_ids.to(forward.device_of(model))
    labels = torch.roll(input_ids, -1, dims=1)
    loss = model(input_ids, _positions(input_ids), None, labels=labels)
    return loss[:, :-1].float()


def _forward_logits(model: Any, input_ids: torch.Tensor) -> torch.Tensor:
    input_ids = input_ids.to(forward.device_of(model))
    return model(input_ids, _positions(input_ids), None)


def _mean(loss: torch.Tensor, _batch: torch.Tensor) -> torch.Tensor:
    return loss.mean()


def _positions(input_ids: torch.Tensor) -> torch.Tensor:
    return torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
