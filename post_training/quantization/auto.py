"""ModelOpt's search for the format of each layer under a limit of bits (``auto``).

Layers that an engine fuses (q, k and v; gate and up) are one linear in Megatron, so they share a
format by construction. Every stage of a pipeline would search alone: PP=1 is required.
"""

from __future__ import annotations

import contextlib
import fnmatch
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.opt.conversion import ModeloptStateManager
from modelopt.torch.quantization.config import QuantizeConfig

from post_training.common.errors import UsageError
from post_training.common.quiet import quiet
from post_training.distributed.collectives import from_all_ranks
from post_training.inference import forward
from post_training.quantization import experts, leaving_out, quantizers, recipes
from post_training.quantization.calibration import Calibration
from post_training.quantization.configuration import (
    ALL_OFF,
    QKV_PATTERNS,
    Config,
    cache_entries,
    dumped,
    for_search,
    named,
)
from post_training.quantization.formats import exportable
from post_training.quantization.formats.exportable import Verdict
from post_training.quantization.options import Choice, QuantizeOptions
from post_training.quantization.recipes import Recipe

# By module name, because the search looks at one layer at a time and not at a recipe's patterns.
_NEVER = ("*output_layer*", "*router*", "*lm_head*", "*mlp.gate.*", "*shared_expert_gate*")


def search(
    model: torch.nn.Module, options: QuantizeOptions, choice: Choice, data: Calibration
) -> tuple[Config, dict[str, Any]]:
    """Search, quantize and calibrate ``model`` in place; a collective call.

    Returns:
        The configuration of keys and values, and the search's own summary: bits, formats by layer.
    """
    core = forward.unwrap(model)
    kv_entries = cache_entries(options.export_kv_cache_quant)
    if isinstance(choice, Recipe):
        arguments, score_size, of_recipe = _of_recipe(choice)
        kv_entries = kv_entries or of_recipe
    else:
        arguments, score_size = _of_options(options), options.auto.auto_quantize_score_size
    left_out = leaving_out.local_names(core, options.asked_to_leave_out)
    arguments["disabled_layers"] += left_out
    if not options.allow_unexportable:
        _require_exportable(core, arguments, weight_only=options.weight_only, target=options.target)
    data.expert_share = options.experts.share
    device = forward.device_of(core)
    batches = [batch.to(device) for batch in data.batches(data.batching.fixed)]
    by_gradient = arguments["method"] == "gradient"
    with quiet(stdout=True), _feasible(options):
        _, state = mtq.auto_quantize(
            core,
            **arguments,
            data_loader=batches,
            # The Taylor expansion of the loss, or the divergence of the logits.
            forward_step=_Step(data, _losses if by_gradient else _forward, len(batches)),
            loss_func=(lambda losses, _batch: losses.mean()) if by_gradient else None,
            num_calib_steps=len(batches),
            num_score_steps=max(1, min(len(batches), score_size // data.batching.fixed)),
            checkpoint=options.auto.auto_quantize_checkpoint or None,
        )
    if kv_entries:
        mtq.set_quantizer_by_cfg(core, kv_entries)
        entries = [ALL_OFF, *kv_entries]
        with quiet(stdout=True), mtq.set_quantizer_by_cfg_context(core, entries):
            mtq.calibrate(core, "max", forward_loop=data)
    _record_all_off(core)
    # The search runs backward passes; nothing later needs what they leave.
    core.zero_grad(set_to_none=True)
    core.eval()
    if options.weight_only:
        mtq.disable_quantizer(model, "*input_quantizer")
    best = state["best"]
    return {"quant_cfg": kv_entries, "algorithm": "auto_quantize"}, {
        "effective_bits": float(best["constraints"]["effective_bits"]),
        "satisfied": bool(best.get("is_satisfied", True)),
        "layers": {
            name.removesuffix(".quant_recipe"): _shown(str(recipe), options, choice)
            for name, recipe in best["recipe"].items()
        },
    }


def _shown(recipe: str, options: QuantizeOptions, choice: Choice) -> str:
    """The format's name, where ModelOpt shows its number among those that are not its own."""
    found = re.match(r"CUSTOM_(\d+)(?=\()", recipe)
    if found is None or isinstance(choice, Recipe):
        return recipe
    return options.auto.formats[int(found[1])].name + recipe[found.end() :]


@contextlib.contextmanager
def _feasible(options: QuantizeOptions) -> Iterator[None]:
    """Make a UsageError, on every rank, of ModelOpt's refusal of too few bits."""
    try:
        yield
    except ValueError as error:
        if "infeasible" not in str(error):
            raise
        raise UsageError(
            f"--auto-quantize-bits {options.auto.bits:g}",
            f"ModelOpt: {error}",
            "give at least as many, or further formats (--auto-quantize-formats)",
        ) from error


def _require_exportable(
    model: Any, arguments: dict[str, Any], *, weight_only: bool, target: str
) -> None:
    """Refuse candidates that no engine reads, alone or in a layer that may get them.

    Asked of layers of the same names and sizes without weights, before the search; a collective
    call.
    """
    everywhere = [*arguments.get("quantization_formats", ())]
    everywhere += filter(None, [arguments.get("fixed_quantization_config")])
    candidates = [(config, ["*"]) for config in everywhere]
    for space in arguments.get("module_search_spaces", ()):
        patterns = space["module_name_patterns"]
        candidates += [(config, patterns) for config in space["quantization_formats"]]
    linears, refused = set(), []
    for candidate, patterns in candidates:
        config = candidate if isinstance(candidate, dict) else named(candidate)
        copy = _without_weights(model, patterns, arguments["disabled_layers"])
        with quiet(stdout=True):
            mtq.replace_quant_module(copy)
        mtq.set_quantizer_by_cfg(copy, config["quant_cfg"])
        if weight_only:
            mtq.disable_quantizer(copy, "*input_quantizer")
        for name, module in copy.named_modules():
            form = quantizers.linear_of(module)
            if form is not None:
                linears.add(form)
                sizes = quantizers.whole_sizes(module)
                refused.append(quantizers.kernel_refusal(name, form, *sizes, target))
    gathered = from_all_ranks((linears, next(filter(None, refused), "")))
    found = exportable.judge(set().union(*(each for each, _ in gathered)), target=target)
    reason = found.reason or next((each for _, each in gathered if each), "")
    if reason:
        raise exportable.unexportable("the search's formats", Verdict(reason=reason))


def _without_weights(
    model: Any, patterns: Sequence[str], disabled: Sequence[str]
) -> torch.nn.Module:
    """The linear layers of ``model`` that a search may quantize, by name, on the meta device."""
    copy = torch.nn.Module()
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is None or weight.ndim != 2 or "Embedding" in type(module).__name__:
            continue
        if not _matches(name, patterns) or _matches(name, disabled):
            continue
        outputs, inputs = quantizers.whole_sizes(module)
        *parents, own = name.split(".")
        place = copy
        for each in parents:
            if not hasattr(place, each):
                place.add_module(each, torch.nn.Module())
            place = getattr(place, each)
        place.add_module(own, torch.nn.Linear(inputs, outputs, bias=False, device="meta"))
    return copy


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _of_options(options: QuantizeOptions) -> dict[str, Any]:
    """Arguments for ModelOpt."""
    rows = options.auto.formats
    qkv = [pattern.removesuffix(".*") for pattern in QKV_PATTERNS]
    return {
        "constraints": {"effective_bits": options.auto.bits},
        "method": options.auto.auto_quantize_method,
        "disabled_layers": [*_NEVER, *(qkv if options.disable_qkv_quant else ())],
        "quantization_formats": [for_search(row.name) for row in rows],
    }


def _of_recipe(recipe: Recipe) -> tuple[dict[str, Any], int, list[Config]]:
    """Arguments for ModelOpt, sequences to score on, and entries for keys and values."""
    loaded = recipes.load(recipe)
    content = loaded.auto_quantize
    arguments: dict[str, Any] = {
        "constraints": {"effective_bits": content.constraints.effective_bits},
        "method": content.auto_quantize_method,
        "disabled_layers": [*_NEVER, *content.disabled_layers],
    }
    if content.candidate_formats:
        arguments["quantization_formats"] = list(map(dumped, content.candidate_formats))
    if loaded.quantize is not None:
        arguments["fixed_quantization_config"] = dumped(loaded.quantize)
    if content.module_search_spaces:
        arguments["module_search_spaces"] = [
            {
                "module_name_patterns": list(space.module_name_patterns),
                "quantization_formats": list(map(dumped, space.candidate_formats)),
                "allow_no_quant": space.allow_no_quant,
            }
            for space in content.module_search_spaces
        ]
    kv_entries = dumped(content.kv_cache)["quant_cfg"] if content.kv_cache else []
    return arguments, content.score_size, kv_entries


def _record_all_off(core: torch.nn.Module) -> None:
    """Let a checkpoint start from quantizers that are off.

    ModelOpt records its default, INT8, as the configuration of a search. Loading first applies
    that, then each layer's own state; an output layer that is off has none, and would be INT8.
    """
    off = QuantizeConfig(quant_cfg=[dict(ALL_OFF)]).model_dump()
    for mode, state in ModeloptStateManager(core).state_dict():
        if mode == "auto_quantize":
            state["config"] = off


@dataclass
class _Step:
    """One batch through the model, of a calibration or of the scores; a collective call.

    Each candidate is calibrated on the batches; tokens of experts are counted once.

    Attributes:
        forward: gives what ModelOpt scores.
        uncounted: batches that are still to be counted.
    """

    data: Calibration
    forward: Callable[..., torch.Tensor]
    uncounted: int

    def __call__(self, model: Any, input_ids: torch.Tensor) -> torch.Tensor:
        if not any(quantizer._if_calib for _, quantizer in quantizers.enabled(model)):
            return self.forward(model, input_ids)
        with self.data.watching_experts(model, count=self.uncounted > 0):
            output = self.forward(model, input_ids)
        self.uncounted -= 1
        experts.settle_idle(model)
        return output


def _forward(model: Any, input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    return model(input_ids, positions.expand_as(input_ids), None, **options)


def _losses(model: Any, input_ids: torch.Tensor) -> torch.Tensor:
    """Loss of each next token, float32 [b, s]; the last position predicts itself and is cut."""
    labels = torch.roll(input_ids, -1, dims=1)
    return _forward(model, input_ids, labels=labels)[:, :-1].float()
