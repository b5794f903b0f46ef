"""What pruning may cut: each hyper-parameter's allowed values, and the architecture that results.

ModelOpt's Minitron cuts widths in steps (``granularity``) and whole layers. Everything here follows
from the architecture alone, so that a width that does not fit is refused before anything is loaded.
Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from post_training.common.errors import UsageError
from post_training.models.architecture import Architecture

OPTION = "--prune-export-config"
# The keys of --prune-export-config are fields of TransformerConfig; what each is called in text.
MEANINGS = {
    "num_layers": "layers",
    "hidden_size": "hidden size",
    "ffn_hidden_size": "FFN size",
    "num_attention_heads": "attention heads",
    "num_query_groups": "query groups",
    "num_moe_experts": "experts",
    "moe_ffn_hidden_size": "experts' FFN size",
    "moe_shared_expert_intermediate_size": "shared experts' FFN size",
    "mamba_num_heads": "Mamba heads",
    "mamba_head_dim": "Mamba head size",
}
_FFN_SIZES = ("ffn_hidden_size", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size")
# Fields with one entry a layer that ModelOpt cuts to the kept layers when they are lists
# (mcore_minitron.py, _PER_LAYER_CONFIG_PATTERNS).
_CUT_BY_LAYER = ("linear_attention_freq", "moe_layer_freq")
# Fields whose every-n-th-layer meaning shifts when a layer in front is dropped.
_BY_LAYER_NUMBER = (*_CUT_BY_LAYER, "no_rope_freq", "window_attn_skip_freq")


@dataclass(frozen=True)
class Granularity:
    """Steps of the widths and of the depth: allowed are multiples, and the original value.

    The defaults are ModelOpt's (``get_mcore_minitron_config``), which fit tensor cores.
    """

    hidden_size: int = 256
    ffn_hidden_size: int = 512
    num_layers: int = 2
    num_moe_experts: int = 8
    mamba_head_dim: int = 8

    @classmethod
    def of(cls, architecture: Architecture, chosen: Mapping[str, int | None]) -> Granularity:
        """``chosen``, by field; where it is None, ModelOpt's step, or a smaller one for a model
        of which that step would leave less than two widths: the largest power of two that leaves
        four."""
        values = architecture.resolved()
        sizes = {
            "hidden_size": values["hidden_size"],
            "ffn_hidden_size": min(values[name] for name in _FFN_SIZES if values[name]),
            "num_moe_experts": values["num_moe_experts"],
        }
        steps = dataclasses.asdict(cls())
        for name, size in sizes.items():
            if size and size < 2 * steps[name]:
                steps[name] = 1 << max(0, (size // 4).bit_length() - 1)
        return cls(**steps | {name: step for name, step in chosen.items() if step})

    def step(self, name: str) -> int:
        """The step of a hyper-parameter; every FFN size has the same."""
        return int(getattr(self, "ffn_hidden_size" if name in _FFN_SIZES else name, 1))


@dataclass(frozen=True)
class Dimension:
    """One hyper-parameter of a model.

    Attributes:
        name: key of --prune-export-config.
        original: value of the model that is pruned; None where the model has no such part.
        choices: allowed values, ascending, the original last.
        rule: how the choices come about, for messages.
    """

    name: str
    original: int | None
    choices: tuple[int, ...]
    rule: str

    def check(self, value: Any) -> None:
        """Raise UsageError, naming the nearest allowed values, unless ``value`` is one."""
        what = f"{OPTION} {self.name} = {json.dumps(value)}"
        if not isinstance(value, int) or isinstance(value, bool):
            raise UsageError(what, "it is not a whole number", "give a whole number")
        if value == self.original:
            return
        if self.original is None:
            raise UsageError(what, self.rule, f"leave {self.name} out")
        if value in self.choices:
            return
        cause = self.rule
        if value > self.original:
            cause = f"the model has {self.original}, and pruning only removes"
        elif value < 1:
            cause = "it is not positive"
        raise UsageError(what, cause, f"use {_join(nearest_values(value, self.choices))}")


@dataclass(frozen=True)
class PruningSpace:
    """What may be pruned of a model: the steps of its sizes, and the values that they allow.

    Attributes:
        granularity: the steps.
        dimensions: by name, every key of ``MEANINGS``.
    """

    granularity: Granularity
    dimensions: Mapping[str, Dimension]

    @classmethod
    def of(cls, architecture: Architecture, steps: Mapping[str, int | None]) -> PruningSpace:
        """Of this model, with ``steps`` as :meth:`Granularity.of` takes them."""
        granularity = Granularity.of(architecture, steps)
        return cls(granularity, _dimensions(architecture, granularity))


def _dimensions(architecture: Architecture, granularity: Granularity) -> dict[str, Dimension]:
    """Every hyper-parameter of ``MEANINGS`` as this model has it."""
    values = architecture.resolved()
    found = {}
    for name in MEANINGS:
        absent = _absent(name, values)
        original = values.get(name)
        if absent or original is None:
            found[name] = Dimension(name, None, (), absent or "the model does not have it")
            continue
        step, rule = _step(name, values, granularity)
        choices = [step * i for i in range(1, original // step + 1)] if step else []
        if name == "num_moe_experts":
            choices = [n for n in choices if n >= values["moe_router_topk"]]
        choices = [*choices, original] if original not in choices else choices
        found[name] = Dimension(name, original, tuple(choices), rule)
    return found


def _step(name: str, values: Mapping[str, Any], granularity: Granularity) -> tuple[int, str]:
    """Step of the allowed values, 0 for none but the original, and the rule in words."""
    fixed = {
        "num_query_groups": "ModelOpt prunes the heads of each query group and keeps all groups",
        "num_attention_heads": "ModelOpt does not prune the heads of this attention",
        "num_layers": "the layers follow a pattern by their number, which dropping would shift",
    }
    if name == "num_query_groups":
        return 0, fixed[name]
    if name == "num_attention_heads":
        if values["multi_latent_attention"] or values["attention_output_gate"]:
            return 0, fixed[name]
        return _multiples(values["num_query_groups"], "heads are cut alike in every query group")
    if name == "mamba_num_heads":
        return _multiples(values["mamba_num_groups"], "heads are cut alike in every group")
    if name == "num_layers" and _has_shifting_pattern(values):
        return 0, fixed[name]
    step = granularity.step(name)
    if name == "num_moe_experts" and values["moe_router_num_groups"]:
        groups = values["moe_router_num_groups"]
        return _multiples(max(step, groups), "the router divides experts into groups")
    flag = "ffn-hidden-size" if name in _FFN_SIZES else name.replace("_", "-")
    return _multiples(step, f"the step is set by --prune-{flag}-divisor")


def _multiples(step: int, why: str) -> tuple[int, str]:
    return step, f"allowed are multiples of {step} ({why}) and the original value"


def _absent(name: str, values: Mapping[str, Any]) -> str:
    """Why a model does not have this hyper-parameter; empty if it has."""
    if name.startswith("mamba"):
        if importlib.util.find_spec("mamba_ssm") is None:
            return "Mamba layers need the package mamba_ssm, which is not installed"
        if "M" not in (values["hybrid_layer_pattern"] or ""):
            return "the model has no Mamba layers"
    experts = values["num_moe_experts"]
    if "moe" in name and not experts:
        return "the model has no experts"
    if name == "moe_shared_expert_intermediate_size" and not values[name]:
        return "the model has no shared experts"
    if name == "ffn_hidden_size" and experts and not _has_dense_layers(values):
        return "every layer has experts and none a dense FFN"
    return ""


def _has_dense_layers(values: Mapping[str, Any]) -> bool:
    pattern = values["hybrid_layer_pattern"]
    if pattern:
        return "-" in pattern
    frequency = values["moe_layer_freq"]
    return 0 in frequency if isinstance(frequency, list) else frequency > 1


def _has_shifting_pattern(values: Mapping[str, Any]) -> bool:
    """Whether some field speaks of every n-th layer, or lists layers and is not cut."""
    for name in _BY_LAYER_NUMBER:
        value = values[name]
        if isinstance(value, list):
            if name not in _CUT_BY_LAYER:
                return True
        elif value is not None and value > 1:
            return True
    return False


def nearest_values(value: int, choices: Iterable[int], count: int = 2) -> list[int]:
    """The allowed values around ``value``: the next smaller ones, then the next larger."""
    below = sorted((n for n in choices if n < value), reverse=True)
    above = sorted(n for n in choices if n > value)
    if below and above:
        return [below[0], above[0]]
    return (below or above)[:count]


def pruned_architecture(
    original: Architecture, config: Mapping[str, int], kept_layers: Iterable[int]
) -> Architecture:
    """The architecture after pruning ``original`` to ``config``.

    Sizes that the original leaves to follow from others (``kv_channels`` is hidden size over heads
    unless stated) are stated, since pruning does not change them.

    Args:
        original: before.
        config: hyper-parameters and their new values.
        kept_layers: numbers of the kept layers, from 1, ascending.
    """
    values = original.resolved()
    stated = ["kv_channels", "num_query_groups", "ffn_hidden_size"]
    if values["num_moe_experts"]:
        stated.append("moe_ffn_hidden_size")
    transformer = {**original.transformer, **{name: values[name] for name in stated}, **config}
    kept = [number - 1 for number in kept_layers]
    for name in _CUT_BY_LAYER:
        if isinstance(transformer.get(name), list):
            transformer[name] = [transformer[name][i] for i in kept]
    pattern = original.hybrid_layer_pattern
    if pattern:
        layers = pattern.split("/")[0].replace("|", "")
        pattern = "".join(layers[i] for i in kept)
    return dataclasses.replace(original, transformer=transformer, hybrid_layer_pattern=pattern)


def _join(values: Iterable[int]) -> str:
    return " or ".join(map(str, values))
