"""Whether an engine's kernels take a model's linear layers in a format. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from post_training.common.errors import UsageError
from post_training.models import parameter_count
from post_training.quantization.engines import registry as engines
from post_training.quantization.engines.base import Support

_REMEDY = (
    "choose another format, such as FP8_DEFAULT_CFG or, for experts, INT8_WEIGHT_ONLY_CFG; or give "
    "--allow-unexportable"
)


def refusal(
    name: str,
    algorithm: str,
    outputs: int,
    inputs: int,
    *,
    target: str = engines.DEFAULT,
    of_experts: bool = False,
) -> str:
    """Why an engine's kernel does not take a linear layer; empty if it does.

    Args:
        name: of the layer, in the message.
        algorithm: ``quant_algo`` of the layer.
        outputs: of the whole layer as the engine fuses it (q, k and v; gate and up).
        target: the engine, by its name in ``--target``.
    """
    engine = engines.TARGETS[target]
    support = engine.algorithms.get(algorithm, Support())
    rows, columns = support.multiples
    if of_experts and not support.experts:
        return f"{engine.name} does not read experts in {algorithm}"
    if outputs % rows or inputs % columns:
        return (
            f"{name} has {outputs} outputs and {inputs} inputs; {engine.name}'s kernel for "
            f"{algorithm} takes multiples of {rows} and {columns}"
        )
    return ""


def check(
    what: str,
    algorithm: str,
    values: Mapping[str, Any],
    target: str,
    *,
    without_qkv: bool = False,
) -> None:
    """Refuse what an engine's kernels do not take: experts, sizes of the model's layers.

    Args:
        what: names the format in a message.
        algorithm: what the model is exported as; empty if it is not quantized.
        values: of the architecture, resolved.
        target: the engine, by its name in ``--target``.
        without_qkv: q, k and v stay in 16 bits.

    Raises:
        UsageError: naming the layer and its sizes.
    """
    support = engines.TARGETS[target].algorithms.get(algorithm, Support())
    for layer in _layers(values, separate=support.separate):
        why = refusal(
            layer.name,
            algorithm,
            layer.outputs,
            layer.inputs,
            target=target,
            of_experts=layer.kind == "experts",
        )
        if why and not (without_qkv and layer.kind == "qkv"):
            raise UsageError(what, why, _REMEDY)


class _Layer(NamedTuple):
    """A linear layer; ``kind`` is ``qkv``, ``experts``, or empty for the others."""

    name: str
    outputs: int
    inputs: int
    kind: str = ""


def _layers(values: Mapping[str, Any], *, separate: bool) -> Iterator[_Layer]:
    """Each kind of linear layer once.

    Args:
        separate: q, k, v and gate, up apart, as Hugging Face's files have them, and not as the
            engine fuses them.
    """
    hidden, heads, head = (
        values[name] for name in ("hidden_size", "num_attention_heads", "kv_channels")
    )
    groups = values["num_query_groups"] * head
    gate = 2 if values["gated_linear_unit"] and not separate else 1
    if values["multi_latent_attention"]:
        of_queries = values["qk_head_dim"] + values["qk_pos_emb_head_dim"]
        pairs = values["qk_head_dim"] + values["v_head_dim"]
        yield _Layer("q", heads * of_queries, values["q_lora_rank"] or hidden)
        yield _Layer("kv_b", heads * pairs, values["kv_lora_rank"])
        yield _Layer("o", hidden, heads * values["v_head_dim"])
    else:
        if separate:
            yield _Layer("q", heads * head, hidden, "qkv")
            yield _Layer("k and v", groups, hidden, "qkv")
        else:
            yield _Layer("q, k, v", heads * head + 2 * groups, hidden, "qkv")
        yield _Layer("o", hidden, heads * head)
    sparse = parameter_count.moe_layers(dict(values))
    sizes = {
        "": ("", 0 if all(sparse) else values["ffn_hidden_size"]),
        "experts' ": ("experts", values["moe_ffn_hidden_size"] if any(sparse) else 0),
        "shared experts' ": (
            "",
            values["moe_shared_expert_intermediate_size"] if any(sparse) else 0,
        ),
    }
    for whose, (kind, size) in sizes.items():
        if size:
            yield _Layer(f"{whose}gate, up", gate * size, hidden, kind)
            yield _Layer(f"{whose}down", hidden, size, kind)
