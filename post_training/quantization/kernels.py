"""Whether an engine's kernels take a model's linear layers in a format. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from post_training.common.errors import UsageError
from post_training.quantization.engines import registry as engines


def check(what: str, algorithm: str, values: Mapping[str, Any], target: str) -> None:
    """Refuse what an engine's kernels do not take: experts, sizes of its fused linears.

    Args:
        what: names the format in a message.
        algorithm: what the model is exported as.
        values: of the architecture, resolved.
        target: the engine, by its name in ``--target``.

    Raises:
        UsageError: naming the layer and its sizes.
    """
    engine = engines.TARGETS[target]
    support = engine.algorithms.get(algorithm)
    if support is None:
        return
    rows, columns = support.multiples
    if values["num_moe_experts"] and not support.experts:
        raise UsageError(
            what,
            f"{engine.name} does not read experts in {algorithm}",
            "choose another format, such as INT8_WEIGHT_ONLY_CFG or FP8_DEFAULT_CFG",
        )
    for name, (outputs, inputs) in linear_sizes(values, separate=support.separate).items():
        if outputs % rows or inputs % columns:
            raise UsageError(
                what,
                f"{name} has {outputs} outputs and {inputs} inputs; {engine.name}'s kernel for "
                f"{algorithm} takes multiples of {rows} and {columns}",
                "choose another format, such as FP8_DEFAULT_CFG, or give --allow-unexportable",
            )


def linear_sizes(values: Mapping[str, Any], *, separate: bool) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of a layer's linears, by what a message calls them.

    Args:
        values: of the architecture, resolved.
        separate: q, k, v and gate, up apart, as Hugging Face's files have them.
    """
    hidden, heads, groups = (
        values[name] for name in ("hidden_size", "num_attention_heads", "num_query_groups")
    )
    attention, head = heads * values["kv_channels"], values["kv_channels"]
    ffn = values["moe_ffn_hidden_size"] if values["num_moe_experts"] else values["ffn_hidden_size"]
    gate = 2 if values["gated_linear_unit"] and not separate else 1
    sizes = {"gate, up": (gate * ffn, hidden), "down": (hidden, ffn)}
    if values["multi_latent_attention"]:
        return sizes
    rows = {"q, k, v": attention + 2 * groups * head}
    if separate:
        rows = {"q": attention, "k and v": groups * head}
    return {**{name: (n, hidden) for name, n in rows.items()}, "o": (hidden, attention), **sizes}
