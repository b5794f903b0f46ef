"""Whether an engine's kernels take a model's linear layers in a format. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from post_training.common.errors import UsageError
from post_training.quantization.engines import registry as engines
from post_training.quantization.engines.base import Support
from post_training.quantization.formats import exportable
from post_training.quantization.formats.base import Format


def check(what: str, choice: Format, values: Mapping[str, Any], *, weight_only: bool) -> None:
    """Refuse what the first engine's kernels do not take: experts, sizes of its fused linears.

    Args:
        what: names the format in a message.
        values: of the architecture, resolved.
        weight_only: inputs stay in 16 bits.

    Raises:
        UsageError: naming the layer and its sizes.
    """
    found = exportable.verdict(choice, weight_only=weight_only)
    if not found.exportable:
        return
    engine = engines.ENGINES[0]
    support = engine.algorithms.get(found.quant_algo, Support())
    rows, columns = support.multiples
    if values["num_moe_experts"] and not support.experts:
        raise UsageError(
            what,
            f"{engine.name} does not read experts in {found.quant_algo}",
            "choose another format, such as INT8_WEIGHT_ONLY_CFG or FP8_DEFAULT_CFG",
        )
    hidden, heads, groups = (
        values[name] for name in ("hidden_size", "num_attention_heads", "num_query_groups")
    )
    attention, head = heads * values["kv_channels"], values["kv_channels"]
    ffn = values["moe_ffn_hidden_size"] if values["num_moe_experts"] else values["ffn_hidden_size"]
    gate = 2 if values["gated_linear_unit"] else 1
    sizes = {"gate, up": (gate * ffn, hidden), "down": (hidden, ffn)}
    if values["multi_latent_attention"]:
        queries = heads * (values["qk_head_dim"] + values["qk_pos_emb_head_dim"])
        pairs = heads * (values["qk_head_dim"] + values["v_head_dim"])
        sizes |= {
            "q": (queries, values["q_lora_rank"] or hidden),
            "kv_b": (pairs, values["kv_lora_rank"]),
            "o": (hidden, heads * values["v_head_dim"]),
        }
    else:
        qkv = attention + 2 * groups * head
        sizes = {"q, k, v": (qkv, hidden), "o": (hidden, attention), **sizes}
    for name, (outputs, inputs) in sizes.items():
        if outputs % rows or inputs % columns:
            raise UsageError(
                what,
                f"{name} has {outputs} outputs and {inputs} inputs; {engine.name}'s kernel for "
                f"{found.quant_algo} takes multiples of {rows} and {columns}",
                "choose another format, such as FP8_DEFAULT_CFG, or give --allow-unexportable",
            )
