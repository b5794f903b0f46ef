"""Whether an engine's kernels take a model's linear layers in a format. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from post_training.common.errors import UsageError
from post_training.distributed.parallel import Parallel
from post_training.models import parameter_count
from post_training.models.architecture import Architecture
from post_training.models.families import registry as families
from post_training.quantization import layer_names
from post_training.quantization.engines import registry as engines
from post_training.quantization.engines.base import COMPRESSED_TENSORS, Support

_REMEDY = (
    "choose another format, such as FP8_DEFAULT_CFG or, for experts, INT8_WEIGHT_ONLY_CFG; or give "
    "--allow-unexportable"
)


def refusal(
    name: str,
    shown: str,
    algorithm: str,
    outputs: int,
    inputs: int,
    *,
    target: str = engines.DEFAULT,
    of_experts: bool = False,
) -> str:
    """Why an engine's kernel does not take a linear layer; empty if it does.

    Args:
        name: of the layer, as :mod:`layer_names` has it.
        shown: what the message calls it.
        algorithm: ``quant_algo`` of the layer.
        outputs: of the whole layer as the engine fuses it (q, k and v; gate and up).
        target: the engine, by its name in ``--target``.
    """
    engine = engines.TARGETS[target]
    support = engine.algorithms.get(algorithm, Support())
    rows, columns = support.multiples
    if of_experts and support.expert_multiples:
        rows, columns = support.expert_multiples
    if of_experts and (unread := engines.experts_refusal(algorithm, target)):
        why = unread
    elif of_experts and inputs < support.expert_inputs:
        why = (
            f"{shown} has {inputs} inputs; {engine.name} computes experts in {algorithm} correctly "
            f"from {support.expert_inputs} on"
        )
    elif outputs % rows or inputs % columns:
        why = (
            f"{shown} has {outputs} outputs and {inputs} inputs; {engine.name}'s kernel for "
            f"{algorithm} takes multiples of {rows} and {columns}"
        )
    else:
        return ""
    return f"{why} (--leave-out '{layer_names.pattern_of(name)}' leaves such layers in 16 bits)"


def check(
    what: str,
    algorithm: str,
    values: Mapping[str, Any],
    target: str,
    *,
    left_out: Sequence[str] = (),
) -> None:
    """Refuse what an engine's kernels do not take: experts, sizes of the model's layers.

    Args:
        what: names the format in a message.
        algorithm: what the model is exported as; empty if it is not quantized.
        values: of the architecture, resolved.
        target: the engine, by its name in ``--target``.
        left_out: patterns of the linears that stay in 16 bits.

    Raises:
        UsageError: naming the layer and its sizes.
    """
    engine = engines.TARGETS[target]
    why = engine.not_modelopt.get(values["huggingface_architecture"] or "", "")
    if why and algorithm and algorithm not in COMPRESSED_TENSORS:
        raise UsageError(
            what,
            f"{engine.name} ({engine.version}) does not load it: {why}",
            "choose a format in the layout of compressed-tensors, such as INT8_WEIGHT_ONLY_CFG or "
            "INT8_PER_CHANNEL_PER_TOKEN_CFG, or another --target",
        )
    support = engine.algorithms.get(algorithm, Support())
    if not support.special and _is_special(values):
        raise UsageError(
            what,
            f"{engine.name}'s {algorithm} was read for linears of q, k, v and gate, up of their "
            "own, which this model's files do not have",
            _REMEDY,
        )
    for layer in layers(values, separate=support.separate):
        name = layer.first_but(left_out)
        why = name and refusal(
            name,
            layer.shown,
            algorithm,
            layer.outputs,
            layer.inputs,
            target=target,
            of_experts=layer.of_experts,
        )
        if why:
            raise UsageError(what, why, _REMEDY)


def _is_special(values: Mapping[str, Any]) -> bool:
    """Whether attention is multi-latent, or linears are joined in the files."""
    family = families.FAMILIES.get(values["huggingface_architecture"] or "")
    return bool(values["multi_latent_attention"] or (family and family.joined(values)))


def check_blocks(
    what: str,
    size: int,
    values: Mapping[str, Any],
    parallel: Parallel,
    *,
    left_out: Sequence[str] = (),
) -> None:
    """Refuse blocks that do not fit into a rank's part of a row.

    Args:
        size: inputs of a row that share a scale.
    """
    wrong, per_rank = {}, ""
    for layer in layers(values, separate=False):
        is_last = layer.module.endswith(("linear_proj", "linear_fc2", "out_proj"))
        ranks = parallel.expert_tensor if layer.of_experts else parallel.tensor
        inputs = layer.inputs // ranks if is_last else layer.inputs
        name = layer.first_but(left_out)
        if name and inputs % size:
            wrong[f"{layer.input} {inputs}"] = layer_names.pattern_of(name)
            per_rank = f" (at TP={ranks})" if ranks > 1 else ""
    if wrong:
        raise UsageError(
            what,
            f"{size} inputs share a scale, which does not divide {', '.join(wrong)}{per_rank}",
            "choose a format without blocks, such as FP8_DEFAULT_CFG, or leave these layers in 16 "
            + "bits: --leave-out "
            + " ".join(f"'{pattern}'" for pattern in dict.fromkeys(wrong.values()))
            + ("; or a smaller TP" if per_rank else ""),
        )


def check_names(patterns: Sequence[str], architecture: Architecture) -> None:
    """Refuse patterns of ``--leave-out`` that match no linear, as :func:`layer_names.check`.

    Models with latent attention or Mamba layers have others too: they are asked once built.
    """
    if patterns and not (architecture.multi_latent_attention or architecture.is_hybrid):
        layer_names.check(patterns, _names(architecture.resolved()))


def _names(values: Mapping[str, Any]) -> list[str]:
    """Of the linears that formats quantize, and of the output layer and the routers."""
    sparse = parameter_count.moe_layers(dict(values))
    routers = [f"decoder.layers.{n}.mlp.router" for n, moe in enumerate(sparse) if moe]
    experts = range(values["num_moe_experts"] or 0)
    found = ["output_layer", *routers]
    for layer in layers(values, separate=False):
        for name in layer.names():
            found += [name.replace("*", str(n)) for n in experts] if "*" in name else [name]
    return found


class Layer(NamedTuple):
    """A kind of linear layer.

    Attributes:
        shown: what a message calls it.
        outputs: of all ranks.
        inputs: of all ranks.
        module: its name in a decoder layer; of an expert, with ``*`` for its number.
        where: numbers of the decoder layers that have it.
        input: what a message calls the number of inputs.
    """

    shown: str
    outputs: int
    inputs: int
    module: str
    where: Sequence[int]
    input: str

    @property
    def of_experts(self) -> bool:
        return ".local_experts." in self.module

    def names(self) -> Iterator[str]:
        return (f"decoder.layers.{number}.{self.module}" for number in self.where)

    def first_but(self, left_out: Sequence[str]) -> str:
        """The first that no pattern leaves out; empty if there is none."""
        # Patterns leave out all of a layer's experts or none: one stands for all.
        named = (name.replace("*", "0") for name in self.names())
        return next((name for name in named if not layer_names.matching(name, left_out)), "")


def layers(values: Mapping[str, Any], *, separate: bool) -> Iterator[Layer]:
    """Each kind of linear layer once.

    Args:
        separate: q, k, v and gate, up apart, as Hugging Face's files have them, and not as the
            engine fuses them.
    """
    letters = values["hybrid_layer_pattern"] or ""
    everywhere = range(values["num_layers"])
    letters = letters if len(letters) == len(everywhere) else ""
    recurrent = parameter_count.delta_nets({**values})
    at = [n for n in everywhere if not recurrent[n]]
    at = [n for n in everywhere if letters[n] == "*"] if letters else at
    yield from _attention(values, at, separate=separate)
    if len(at) < len(everywhere) and not letters:
        where = [n for n in everywhere if recurrent[n]]
        yield from _delta_net(values, where, separate=separate)
    hidden = values["hidden_size"]
    gate = 2 if values["gated_linear_unit"] and not separate else 1
    sparse = (
        [each == "E" for each in letters] if letters else parameter_count.moe_layers({**values})
    )
    dense = [each == "-" for each in letters] if letters else [not each for each in sparse]
    kinds = (
        ("", "mlp", values["ffn_hidden_size"], dense),
        ("experts' ", "mlp.experts.local_experts.*", values["moe_ffn_hidden_size"], sparse),
        (
            "shared experts' ",
            "mlp.shared_experts",
            values["moe_shared_expert_intermediate_size"],
            sparse,
        ),
    )
    for whose, module, size, has_it in kinds:
        where = [n for n in everywhere if has_it[n]]
        if where and size:
            fc1, fc2 = f"{module}.linear_fc1", f"{module}.linear_fc2"
            yield Layer(f"{whose}gate, up", gate * size, hidden, fc1, where, "hidden size")
            yield Layer(f"{whose}down", hidden, size, fc2, where, f"{whose}FFN size")


def _attention(values: Mapping[str, Any], at: Sequence[int], *, separate: bool) -> Iterator[Layer]:
    """The linears of the attention in the layers ``at``."""
    hidden, heads, head = (
        values[name] for name in ("hidden_size", "num_attention_heads", "kv_channels")
    )
    groups = values["num_query_groups"] * head
    queries = heads * head * (2 if values["attention_output_gate"] else 1)

    def layer(
        shown: str, outputs: int, inputs: int, own: str, called: str = "hidden size"
    ) -> Layer:
        return Layer(shown, outputs, inputs, f"self_attention.{own}", at, called)

    if values["multi_latent_attention"]:
        of_queries = values["qk_head_dim"] + values["qk_pos_emb_head_dim"]
        pairs = values["qk_head_dim"] + values["v_head_dim"]
        rank = values["q_lora_rank"]
        called = ("linear_q_up_proj", "q_lora_rank") if rank else ("linear_q_proj", "hidden size")
        latent = values["kv_lora_rank"]
        yield layer("q", heads * of_queries, rank or hidden, *called)
        yield layer("kv_b", heads * pairs, latent, "linear_kv_up_proj", "kv_lora_rank")
    elif separate:
        yield layer("q", queries, hidden, "linear_qkv")
        yield layer("k and v", groups, hidden, "linear_qkv")
    else:
        yield layer("q, k, v", queries + 2 * groups, hidden, "linear_qkv")
    size = values["v_head_dim"] if values["multi_latent_attention"] else head
    yield layer("o", hidden, heads * size, "linear_proj", "heads x head size")


def _delta_net(values: Mapping[str, Any], at: Sequence[int], *, separate: bool) -> Iterator[Layer]:
    """The linears of gated delta nets; what decides how much they forget stays in 16 bits."""
    hidden, heads = values["hidden_size"], values["linear_num_value_heads"]
    keys = values["linear_num_key_heads"]
    key, value = values["linear_key_head_dim"], heads * values["linear_value_head_dim"]
    own, out = "self_attention.in_proj", "self_attention.out_proj"
    if separate:
        # Files have the rows of a key head together, or those of all key heads.
        yield Layer("q or k of a gated delta net's head", key, hidden, own, at, "hidden size")
        of_head = value // keys
        yield Layer("v or z of a gated delta net's head", of_head, hidden, own, at, "hidden size")
    else:
        outputs = 2 * (keys * key + value)
        yield Layer("a gated delta net's q, k, v, z", outputs, hidden, own, at, "hidden size")
    yield Layer("a gated delta net's output", hidden, value, out, at, "value heads x head size")
