"""What a recipe reached in a model, what it left out and why, and whether anything was missed.

A weight that the recipe matches and that has no scale afterwards is an error: the export would
lack the scale, and an engine would compute with garbage.
"""

from __future__ import annotations

import fnmatch
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from megatron.core import parallel_state

from post_training.common.errors import UsageError
from post_training.distributed.collectives import from_all_ranks
from post_training.quantization import probe, quantizers
from post_training.quantization.coverage_report import Coverage, Layer

_SHOWN = 5
NOT_MATCHED = "no pattern of the recipe matches"


def linears(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Name and module of each that multiplies by a weight; embeddings do not.

    A layer without a weight of its own (a tied output layer) is left out.
    """
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is None or weight.ndim != 2 or "Embedding" in type(module).__name__:
            continue
        yield name, module


def survey(model: torch.nn.Module, config: quantizers.Config | None = None) -> Coverage:
    """What is quantized in ``model``, over the ranks of one replica; a collective call.

    Args:
        model: this rank's part, quantizers inserted.
        config: what was inserted, to say why the rest is not; None where a search decided.

    Raises:
        UsageError: on every rank, if the recipe matches a weight that has no quantizer, or none.
    """
    tensor_size = parallel_state.get_tensor_model_parallel_world_size()
    first = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    entries = list((config or {}).get("quant_cfg") or [])
    layers, missed = [], []
    weights = set()
    tied = bool(getattr(model, "share_embeddings_and_output_weights", False))
    for name, module in linears(model):
        weight: Any = module._parameters["weight"]
        weights.add(id(weight))
        if tied and name == "output_layer":
            continue  # a copy of the embedding, on another pipeline stage
        shards = tensor_size if getattr(weight, "tensor_model_parallel", False) else 1
        form = probe.linear_of(module)
        asked, reason = wanted(name, module, entries)
        if form is None and asked:
            missed.append(_global_name(model, name))
        if config is None:
            reason = "the search left it in 16 bits"
        reason = "" if form else reason
        layers.append(Layer(_global_name(model, name), _numel(weight) * shards, form, reason))
    others = 0
    for name, parameter in model.named_parameters():
        if id(parameter) not in weights and not _is_scale(name):
            is_shard = getattr(parameter, "tensor_model_parallel", False)
            others += parameter.numel() * (tensor_size if is_shard else 1)
    is_leader = first and parallel_state.get_tensor_model_parallel_rank() == 0
    mine = (layers, others, _count(model), _unused(model, entries), missed)
    gathered = [each for each in from_all_ranks((is_leader, mine)) if each[0]]
    parts = [each[1] for each in gathered]
    unused = set(parts[0][3]).intersection(*(part[3] for part in parts))
    _refuse_missed([name for part in parts for name in part[4]])
    counts: Counter[str] = Counter()
    for part in parts:
        counts.update(part[2])
    found = Coverage(
        tuple(layer for part in parts for layer in part[0]),
        sum(part[1] for part in parts),
        dict(counts),
        tuple(pattern for pattern in parts[0][3] if pattern in unused),
    )
    if not found.quantized and not counts:
        raise UsageError(
            "the quantization recipe",
            f"none of the model's {len(found.layers)} linear layers is quantized: "
            + "; ".join(found.describe_left_out().splitlines()[:_SHOWN]),
            "choose a format whose layers the model has",
        )
    return found


def wanted(
    name: str, module: torch.nn.Module, entries: Iterable[Mapping[str, Any]]
) -> tuple[bool, str]:
    """Whether the recipe asks for the module's weight to be quantized, and if not, why not.

    As ModelOpt applies it: the last entry that matches decides.
    """
    asked, reason = False, NOT_MATCHED
    for entry in entries:
        pattern = entry["quantizer_name"]
        if entry.get("parent_class") and type(module).__name__ != entry["parent_class"]:
            continue
        if fnmatch.fnmatch(f"{name}.weight_quantizer", pattern):
            asked = entry.get("enable", True) is not False
            reason = NOT_MATCHED if pattern == "*" else f"the recipe leaves {pattern} plain"
            if pattern in quantizers.QKV_PATTERNS:
                reason = "--disable-qkv-quant"
    return asked, reason


def check_scales(
    model: torch.nn.Module, rows: Mapping[str, int], *, dynamic_inputs: bool = False
) -> None:
    """Raise UsageError, on every rank, if an enabled quantizer has no usable scale.

    Args:
        model: this rank's part, calibrated.
        rows: how many rows each quantizer saw (:func:`calibration.watching`).
        dynamic_inputs: the recipe has no calibration, so inputs without a stored maximum take
            their own; weights never do.
    """
    broken = []
    for name, quantizer in probe.enabled(model):
        problem = ""
        if probe.needs_amax(quantizer) and ("weight_quantizer" in name or not dynamic_inputs):
            problem = _scale_problem(getattr(quantizer, "_amax", None))
        if rows.get(name, 1) == 0:
            # A place for a fallback: an expert that no token chose could take its siblings'.
            idle = "no calibration token chose this expert" if "experts" in name else ""
            problem = idle or "the layer's forward pass does not use it"
        if problem:
            broken.append(f"{_global_name(model, name)} ({problem})")
    found = [each for part in from_all_ranks(broken) for each in part]
    if found:
        found = list(dict.fromkeys(found))
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise UsageError(
            f"{len(found)} quantizers without a usable scale",
            ", ".join(found[:_SHOWN]) + more,
            "give calibration data that reaches these layers (--calib-size, "
            "--calib-dataset-path-or-name), or leave them out in a recipe",
        )


def _scale_problem(amax: torch.Tensor | None) -> str:
    if amax is None:
        return "it saw no data"
    highest, lowest = float(amax.float().max()), float(amax.float().min())
    if not (math.isfinite(highest) and math.isfinite(lowest)):
        return f"its maximum is {highest}"
    # One channel or block may be all zeros, such as padding of the vocabulary.
    return "" if highest > 0 and lowest >= 0 else f"its maximum is {highest:g}"


def _refuse_missed(names: list[str]) -> None:
    if names:
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        raise UsageError(
            f"{len(names)} weights that the recipe matches",
            f"ModelOpt placed no quantizer there: {', '.join(names[:_SHOWN])}{more}",
            "build the model with ModelOpt's layer spec (no --export-default-te-spec), or leave "
            "these layers out in a recipe",
        )


def _count(model: torch.nn.Module) -> dict[str, int]:
    kinds = {
        "weight_quantizer": "weight",
        "input_quantizer": "input",
        "output_quantizer": "output",
        "k_bmm_quantizer": "KV cache",
        "v_bmm_quantizer": "KV cache",
    }
    counts: Counter[str] = Counter()
    for name, _ in probe.enabled(model):
        # Some weights have two quantizers in a row, "weight_quantizer.0" and ".1": count one.
        parent, _, own = name.rpartition(".")
        if own.isdecimal():
            if own != "0":
                continue
            own = parent.rpartition(".")[2]
        counts[kinds.get(own, own.removesuffix("_quantizer"))] += 1
    return dict(counts)


def _unused(model: torch.nn.Module, entries: Iterable[Mapping[str, Any]]) -> list[str]:
    """Patterns that switch something on and match no quantizer of this rank."""
    names = probe.names(model)
    patterns = [each["quantizer_name"] for each in entries if each.get("enable", True) is not False]
    return [each for each in dict.fromkeys(patterns) if not fnmatch.filter(names, each)]


def _global_name(model: torch.nn.Module, name: str) -> str:
    """Replace the layer's place on this pipeline stage by its number in the model, from 0."""
    parts = name.split(".")
    if len(parts) > 2 and parts[:2] == ["decoder", "layers"] and parts[2].isdecimal():
        layer: Any = model.get_submodule(".".join(parts[:3]))
        parts[2] = str(layer.layer_number - 1)
    return ".".join(parts)


def _numel(weight: Any) -> int:
    """Parameters of a weight, also where it is already packed."""
    shape = getattr(weight, "metadata", {}).get("shape", weight.shape)
    return math.prod(shape)


def _is_scale(name: str) -> bool:
    return "quantizer" in name
