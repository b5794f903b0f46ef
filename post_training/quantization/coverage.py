"""What a recipe reached in a model, what it left out and why, and whether anything was missed.

A weight that the recipe matches and that has no scale afterwards is an error: the export would
lack the scale, and an engine would compute with garbage.
"""

from __future__ import annotations

import fnmatch
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.post_training.modelopt.layers import Linear as DownProjection
from modelopt.torch.quantization.nn import SequentialQuantizer, TensorQuantizer

from post_training.common.errors import UsageError
from post_training.distributed.collectives import from_all_ranks
from post_training.models.delta_net import PlainLinear
from post_training.quantization import layer_names, quantizers
from post_training.quantization.configuration import QKV_PATTERNS, Config
from post_training.quantization.formats import registry as formats
from post_training.quantization.formats.base import Linear

_SHOWN = 5
_KINDS = {
    "weight_quantizer": "weight",
    "input_quantizer": "input",
    "output_quantizer": "output",
    "k_bmm_quantizer": "KV cache",
    "v_bmm_quantizer": "KV cache",
}


@dataclass(frozen=True)
class Layer:
    """One linear layer of the model, over all ranks.

    Attributes:
        name: module name with the layer's number in the whole model.
        parameters: of the whole weight.
        form: how it is quantized; None if it is not.
        reason: why it is not quantized; empty otherwise, and where the recipe asks for it.
    """

    name: str
    parameters: int
    form: Linear | None
    reason: str = ""

    @property
    def outcome(self) -> str:
        if not self.form:
            return self.reason
        return f"{self.form.weight} with {self.form.input or '16-bit'} inputs"

    def bits(self, plain: int) -> float:
        """Stored per weight, scales included; ``plain`` where it is not quantized."""
        number_format = formats.WEIGHTS.get(self.form.weight) if self.form else None
        return number_format.bits if number_format else plain


@dataclass(frozen=True)
class Coverage:
    """The state of a model after quantizers were inserted.

    Attributes:
        layers: every linear layer, by name.
        other_parameters: parameters that are not weights of linear layers.
        quantizers: kind (``weight``, ``input``, ``KV cache``, ...) -> number that are enabled.
        unused_patterns: patterns of the recipe that match nothing.
    """

    layers: list[Layer]
    other_parameters: int
    quantizers: dict[str, int]
    unused_patterns: list[str]

    @property
    def quantized(self) -> list[Layer]:
        return [layer for layer in self.layers if layer.form]

    @property
    def left_out(self) -> list[Layer]:
        return [layer for layer in self.layers if not layer.form]

    def bits_per_weight(self, plain_bits: int = 16) -> tuple[float, float]:
        """Stored bits per parameter, scales included: of quantized layers, and of all.

        Args:
            plain_bits: of parameters that are not quantized.
        """
        weights = sum(layer.parameters for layer in self.quantized)
        bits = sum(layer.bits(plain_bits) * layer.parameters for layer in self.quantized)
        plain = sum(layer.parameters for layer in self.left_out) + self.other_parameters
        total = (bits + plain_bits * plain) / max(1, weights + plain)
        return (bits / weights if weights else float(plain_bits)), total

    def describe_quantized(self) -> str:
        """``28 linear_fc1, 28 linear_fc2: fp8 with fp8 inputs``, one line a form."""
        layers = sorted(self.quantized, key=lambda layer: str(layer.form))
        return "\n".join(_grouped(layers)) or "none"

    def describe_left_out(self) -> str:
        """The plain linear layers by reason, one line each."""
        lines = _grouped(self.left_out)
        if self.unused_patterns:
            count = len(self.unused_patterns)
            lines.append(f"{count} patterns match nothing here, e.g. {self.unused_patterns[0]}")
        return "\n".join(lines) or "none"

    def to_json(self) -> dict[str, Any]:
        """For the manifest."""
        of_quantized, of_all = self.bits_per_weight()
        return {
            "parameters": sum(each.parameters for each in self.layers) + self.other_parameters,
            "linear_layers": len(self.layers),
            "quantized_layers": len(self.quantized),
            "quantizers": self.quantizers,
            "left_out": {each.name: each.reason for each in self.left_out},
            "unused_patterns": self.unused_patterns,
            "bits_per_quantized_weight": round(of_quantized, 3),
            "bits_per_weight": round(of_all, 3),
        }


def _grouped(layers: Iterable[Layer]) -> list[str]:
    """Their own names, counted, and what was done to them: a line for each."""
    groups: dict[str, Counter[str]] = {}
    for layer in layers:
        parts = [part for part in layer.name.split(".") if not part.isdecimal()]
        name = f"experts' {parts[-1]}" if "local_experts" in parts else parts[-1]
        groups.setdefault(layer.outcome, Counter())[name] += 1
    return [
        ", ".join(f"{n} {name}" if n > 1 else name for name, n in names.items()) + f": {outcome}"
        for outcome, names in groups.items()
    ]


def survey(
    model: torch.nn.Module, config: Config | None = None, left_out: Sequence[str] = ()
) -> Coverage:
    """What is quantized in ``model``, over the ranks of one replica; a collective call.

    Args:
        model: this rank's part, quantizers inserted.
        config: what was inserted, to say why the rest is not; None where a search decided.
        left_out: patterns of ``--leave-out``.

    Raises:
        UsageError: on every rank, if the recipe matches a weight that has no quantizer, or none.
    """
    # Experts are divided otherwise than the rest of the model.
    leads = {
        False: parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
        and parallel_state.get_tensor_model_parallel_rank() == 0,
        True: parallel_state.get_expert_data_parallel_rank() == 0
        and parallel_state.get_expert_tensor_parallel_rank() == 0,
    }
    mine = [_survey_rank(model, config, left_out, of_experts=each) for each in leads if leads[each]]
    parts = [part for each in from_all_ranks(mine) for part in each]
    counts = sum((Counter(part.quantizers) for part in parts), Counter())
    found = Coverage(
        [layer for part in parts for layer in part.layers],
        sum(part.other_parameters for part in parts),
        dict(counts),
        [
            pattern
            for pattern in parts[0].unused_patterns
            if all(pattern in part.unused_patterns for part in parts)
        ],
    )
    missed = [layer.name for layer in found.left_out if not layer.reason]
    if missed:
        raise UsageError(
            f"{len(missed)} weights that the recipe matches",
            f"ModelOpt placed no quantizer there: {layer_names.first_names(missed)}",
            "build the model with ModelOpt's layer spec (no --export-default-te-spec), or leave "
            "these layers out in a recipe",
        )
    if not found.quantized and not counts:
        raise UsageError(
            "the quantization recipe",
            f"none of the model's {len(found.layers)} linear layers is quantized: "
            + "; ".join(found.describe_left_out().splitlines()[:_SHOWN]),
            "choose a format whose layers the model has",
        )
    return found


def _survey_rank(
    model: torch.nn.Module, config: Config | None, left_out: Sequence[str], *, of_experts: bool
) -> Coverage:
    """This rank's part of :func:`survey`, of its experts or of what is no expert."""
    entries = config["quant_cfg"] if config else []
    tied = getattr(model, "share_embeddings_and_output_weights", False)
    layers, weights = [], set()
    for name, module in model.named_modules():
        if not quantizers.is_linear(module) or layer_names.is_expert(f"{name}.") != of_experts:
            continue  # multiplies by no weight, or by another module's
        weight = module._parameters["weight"]
        weights.add(id(weight))
        if tied and name == "output_layer":
            continue  # a copy of the embedding, on another pipeline stage
        form, reason = quantizers.linear_of(module), ""
        whole = _with_number_of_expert(model, layer_names.global_name(model, name))
        if form is None and (pattern := layer_names.matching(whole, left_out)):
            reason = f"--leave-out {pattern}"
        elif form is None:
            searched = "the search left it in 16 bits"
            reason = _why_plain(name, module, entries) if config else searched
        layers.append(Layer(whole, _size(weight, of_experts), form, reason))
    others = sum(
        _size(parameter, of_experts)
        for name, parameter in model.named_parameters()
        if id(parameter) not in weights
        and "quantizer" not in name
        and layer_names.is_expert(name) == of_experts
    )
    return Coverage(layers, others, _count(model, of_experts), _unused(model, entries))


def _with_number_of_expert(model: Any, name: str) -> str:
    """Replace the expert's place on this rank by its number in the layer, from 0."""
    found = layer_names.EXPERT.search(name)
    if found is None:
        return name
    ranks = parallel_state.get_expert_model_parallel_world_size()
    before = parallel_state.get_expert_model_parallel_rank() * model.config.num_moe_experts // ranks
    start, end = found.span(1)
    return f"{name[:start]}{before + int(found[1])}{name[end:]}"


def _why_plain(name: str, module: torch.nn.Module, entries: Sequence[Config]) -> str:
    """Why the recipe leaves the module's weight plain; empty if it asks for a quantizer.

    As ModelOpt applies it: the last entry that matches decides.
    """
    reason = nothing = "no pattern of the recipe matches"
    for entry in entries:
        pattern = entry["quantizer_name"]
        if entry.get("parent_class") not in (None, "", type(module).__name__):
            continue
        if not fnmatch.fnmatch(f"{name}.weight_quantizer", pattern):
            continue
        if entry.get("enable", True) is not False:
            reason = ""
        elif pattern in QKV_PATTERNS:
            reason = "--disable-qkv-quant"
        else:
            reason = nothing if pattern == "*" else f"the recipe leaves {pattern} plain"
    if not reason and isinstance(module, DownProjection):
        return "ModelOpt quantizes no down projections of latent attention"
    if not reason and isinstance(module, PlainLinear):
        return "engines keep what a gated delta net forgets by in 16 bits"
    return reason


def _count(model: torch.nn.Module, of_experts: bool) -> dict[str, int]:
    """Enabled quantizers of each kind."""
    counts: Counter[str] = Counter()
    for name, _ in quantizers.enabled(model):
        if layer_names.is_expert(name) != of_experts:
            continue
        # Some weights have two quantizers in a row, "weight_quantizer.0" and ".1": count one.
        own = name.removesuffix(".0").rpartition(".")[2]
        if not own.isdecimal():
            counts[_KINDS.get(own, own.removesuffix("_quantizer"))] += 1
    return dict(counts)


def _unused(model: torch.nn.Module, entries: Sequence[Config]) -> list[str]:
    """Patterns that switch something on and match no quantizer of this rank."""
    kinds = (TensorQuantizer, SequentialQuantizer)
    names = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    patterns = [each["quantizer_name"] for each in entries if each.get("enable", True) is not False]
    return [each for each in dict.fromkeys(patterns) if not fnmatch.filter(names, each)]


def _size(parameter: Any, of_experts: bool) -> int:
    """Elements over all tensor-parallel ranks, also of a weight that is packed."""
    shape = getattr(parameter, "metadata", {}).get("shape", parameter.shape)
    is_shard = getattr(parameter, "tensor_model_parallel", False)
    ranks = 1
    if is_shard:
        ranks = (
            parallel_state.get_expert_tensor_parallel_world_size()
            if of_experts
            else parallel_state.get_tensor_model_parallel_world_size()
        )
    return math.prod(shape) * ranks
