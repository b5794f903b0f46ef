"""What pruning may cut: each hyper-parameter's allowed values, and the architecture that results.

ModelOpt's Minitron cuts widths in steps (its granularity) and whole layers. Everything here follows
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

from post_training.common import inputs, json_text, regular
from post_training.common.errors import UsageError, suggest
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
# ModelOpt's steps (``get_mcore_minitron_config``), which fit tensor cores: allowed are multiples,
# and the original value. All FFN sizes have the same.
STEPS = {
    "hidden_size": 256,
    "ffn_hidden_size": 512,
    "num_layers": 2,
    "num_moe_experts": 8,
    "mamba_head_dim": 8,
}
_FFN_SIZES = ("ffn_hidden_size", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size")
# Fields with one entry a layer that ModelOpt cuts to the kept layers when they are lists
# (mcore_minitron.py, _PER_LAYER_CONFIG_PATTERNS).
_CUT_BY_LAYER = ("linear_attention_freq", "moe_layer_freq")
# Fields whose every-n-th-layer meaning shifts when a layer in front is dropped.
_BY_LAYER_NUMBER = (*_CUT_BY_LAYER, "no_rope_freq", "window_attn_skip_freq")


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
        if self.original is None:
            raise UsageError(what, self.rule, f"leave {self.name} out")
        if value in self.choices:
            return
        cause = self.rule
        if value > self.original:
            cause = f"the model has {self.original}, and pruning only removes"
        elif value < 1:
            cause = "it is not positive"
        below = [choice for choice in reversed(self.choices) if choice < value]
        above = [choice for choice in self.choices if choice > value]
        nearest = [below[0], above[0]] if below and above else (below or above)[:2]
        raise UsageError(what, cause, f"use {' or '.join(map(str, nearest))}")


@dataclass(frozen=True)
class PruningSpace:
    """What may be pruned of a model: steps by the keys of ``STEPS``, and the values that they allow
    by the keys of ``MEANINGS``."""

    steps: Mapping[str, int]
    dimensions: Mapping[str, Dimension]

    @classmethod
    def of(cls, architecture: Architecture, chosen: Mapping[str, int | None]) -> PruningSpace:
        """Of this model, with the ``chosen`` steps; where one is None, what fits the model."""
        values = architecture.resolved()
        steps = _fitting_steps(values) | {name: step for name, step in chosen.items() if step}
        return cls(steps, {name: _dimension(name, values, steps) for name in MEANINGS})


def _fitting_steps(values: Mapping[str, Any]) -> dict[str, int]:
    """ModelOpt's steps; where one would leave less than two widths, the largest power of two that
    leaves four."""
    steps = dict(STEPS)
    sizes = {
        "hidden_size": values["hidden_size"],
        "ffn_hidden_size": min(values[name] for name in _FFN_SIZES if values[name]),
        "num_moe_experts": values["num_moe_experts"],
    }
    for name, size in sizes.items():
        if size and size < 2 * steps[name]:
            steps[name] = 1 << max(0, (size // 4).bit_length() - 1)
    return steps


def _dimension(name: str, values: Mapping[str, Any], steps: Mapping[str, int]) -> Dimension:
    absent, original = _absent(name, values), values.get(name)
    if absent or original is None:
        return Dimension(name, None, (), absent or "the model does not have it")
    step, rule = _step(name, values, steps)
    choices = set(range(step, original + 1, step)) if step else set()
    if name == "num_moe_experts":
        choices = {count for count in choices if count >= values["moe_router_topk"]}
    return Dimension(name, original, tuple(sorted({*choices, original})), rule)


def _step(name: str, values: Mapping[str, Any], steps: Mapping[str, int]) -> tuple[int, str]:
    """Step of the allowed values, 0 for none but the original, and the rule in words."""
    if name == "num_query_groups":
        return 0, "ModelOpt prunes the heads of each query group and keeps all groups"
    if name == "num_attention_heads":
        if values["multi_latent_attention"] or values["attention_output_gate"]:
            return 0, "ModelOpt does not prune the heads of this attention"
        return _multiples(values["num_query_groups"], "heads are cut alike in every query group")
    if name == "mamba_num_heads":
        return _multiples(values["mamba_num_groups"], "heads are cut alike in every group")
    if name == "num_layers" and _has_shifting_pattern(values):
        return 0, "the layers follow a pattern by their number, which dropping would shift"
    step = steps["ffn_hidden_size" if name in _FFN_SIZES else name]
    if name == "num_moe_experts" and values["moe_router_num_groups"]:
        groups = values["moe_router_num_groups"]
        return _multiples(max(step, groups), "the router divides experts into groups")
    flag = "ffn-hidden-size" if name in _FFN_SIZES else name.replace("_", "-")
    return _multiples(step, f"the step is set by --prune-{flag}-divisor")


def _multiples(step: int, why: str) -> tuple[int, str]:
    return step, f"allowed are multiples of {step} ({why}) and the original value"


def _absent(name: str, values: Mapping[str, Any]) -> str:
    """Why a model does not have this hyper-parameter; empty if it has."""
    pattern, experts = values["hybrid_layer_pattern"] or "", values["num_moe_experts"]
    if name.startswith("mamba"):
        if importlib.util.find_spec("mamba_ssm") is None:
            return "Mamba layers need the package mamba_ssm, which is not installed"
        if "M" not in pattern:
            return "the model has no Mamba layers"
    if "moe" in name and not experts:
        return "the model has no experts"
    if name == "moe_shared_expert_intermediate_size" and not values[name]:
        return "the model has no shared experts"
    if name == "ffn_hidden_size" and experts:
        frequency = values["moe_layer_freq"]
        dense = 0 in frequency if isinstance(frequency, list) else frequency > 1
        if not ("-" in pattern if pattern else dense):
            return "every layer has experts and none a dense FFN"
    return ""


def _has_shifting_pattern(values: Mapping[str, Any]) -> bool:
    """Whether some field speaks of every n-th layer, or lists layers and is not cut."""
    listed = {name for name in _BY_LAYER_NUMBER if isinstance(values[name], list)}
    every = [values[name] or 0 for name in _BY_LAYER_NUMBER if name not in listed]
    return bool(listed - set(_CUT_BY_LAYER)) or max(every, default=0) > 1


def read_sizes(text: str) -> dict[str, Any]:
    """The JSON object of --prune-export-config: the text itself, or the file that it names.

    Raises:
        UsageError: if it is not JSON or no object, or a key is unknown; the nearest are named.
    """
    shown = f"{OPTION} {text}"
    example = f"""{OPTION} '{{"hidden_size": 3072, "num_layers": 32}}'"""
    path = None
    if not text.lstrip().startswith("{"):
        path = inputs.expanded(text)
        if not path.is_file():
            cause = "it is neither a JSON object nor a file"
            raise UsageError(shown, cause, f"quote it: {example}")
    try:
        if path is not None:
            text = regular.read_text(path)
        content = json_text.parse(text)
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(shown, f"it is not JSON: {error}", f"quote it: {example}") from error
    if not isinstance(content, dict):
        raise UsageError(shown, "it is not a JSON object", f"write {example}")
    for key in content:
        if key not in MEANINGS:
            hint = suggest(key, MEANINGS) or f"known are {', '.join(MEANINGS)}"
            raise UsageError(f"{OPTION} {key}", "unknown hyper-parameter", hint)
    return content


def check_sizes(content: Mapping[str, Any], allowed: Mapping[str, Dimension]) -> dict[str, int]:
    """The values that change something.

    Raises:
        UsageError: unless every value is allowed and something is pruned.
    """
    for name, value in content.items():
        allowed[name].check(value)
    # Widths that stay as they are would be sorted for nothing.
    changed = {name: value for name, value in content.items() if value != allowed[name].original}
    if changed:
        return changed
    example = f"another model than this: no value of {OPTION} is smaller"
    names = ("ffn_hidden_size", "moe_ffn_hidden_size", "hidden_size", "num_layers")
    prunable = [allowed[name] for name in names if len(allowed[name].choices) > 1]
    if prunable:
        example = f"""{OPTION} '{{"{prunable[0].name}": {prunable[0].choices[-2]}}}'"""
    raise UsageError(
        f"{OPTION} {json.dumps(dict(content))}",
        "it leaves everything as it is",
        f"give smaller values, e.g. {example}",
    )


def pruned_architecture(
    original: Architecture, config: Mapping[str, int], kept_layers: Iterable[int]
) -> Architecture:
    """The architecture after pruning ``original`` to ``config``.

    Sizes that the original leaves to follow from others (``kv_channels`` is hidden size over heads
    unless stated) are stated, since pruning does not change them. ``kept_layers`` are numbers from
    1, ascending.
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
