"""How many parameters a model has, in total and on each rank, without building it. No torch.

Counts what megatron-core 0.19 allocates for ModelOpt's layer spec (``builder.py``): a linear layer
is split over the tensor-parallel ranks along one dimension, an expert over the expert-tensor-
parallel ranks; norms, routers and multi-latent attention's down projections are replicated. Tests
compare the counts with built models.
"""

from __future__ import annotations

import itertools
from typing import Any

from post_training.common.errors import UsageError
from post_training.distributed.parallel import Parallel
from post_training.models.architecture import Architecture
from post_training.models.parallel_check import layers_per_stage

# Fields whose parameters are not counted here; a model with one of them is refused.
_UNKNOWN = ("mtp_num_layers", "heterogeneous_block_specs")
_CONVOLVED = 4  # tokens that a Mamba layer's convolution sees: megatron-core has no other


def total(architecture: Architecture) -> int:
    """Parameters of the whole model; tied embeddings count once. Fails as :func:`per_stage`."""
    ((_, parameters),) = per_stage(architecture, Parallel())
    return parameters


def per_stage(architecture: Architecture, parallel: Parallel) -> list[tuple[int, int]]:
    """The layers of each pipeline stage, first to last, and the parameters on each of its ranks.

    Tied embeddings count on the first and on the last stage, as megatron-core allocates them.
    UsageError names parts that are not counted here, or layers that cannot be spread evenly.
    """
    values = architecture.resolved()
    unknown = [f"{name} = {values[name]}" for name in _UNKNOWN if values[name]]
    if (variant := values["experimental_attention_variant"]) not in (None, "gated_delta_net"):
        unknown.append(f"experimental_attention_variant = {variant}")
    letters = values["hybrid_layer_pattern"] or ""
    if architecture.is_hybrid and (not letters or {*letters} - {*"M*-E"}):
        unknown.append(f"hybrid_layer_pattern = {letters!r}")
    if unknown:
        raise UsageError(
            ", ".join(unknown),
            "parameters of such a model are not counted yet",
            "leave --dry-run out, or take a model without it",
        )
    stages = layers_per_stage(values["num_layers"], parallel)
    norm = _norm(values, values["hidden_size"])
    each_layer = iter(_layers(values, parallel))
    counts = [sum(itertools.islice(each_layer, layers)) for layers in stages]
    embedding = values["vocab_size"] * values["hidden_size"] // parallel.tensor
    counts[0] += embedding
    if values["position_embedding_type"] == "learned_absolute":
        counts[0] += values["max_position_embeddings"] * values["hidden_size"]
    counts[-1] += norm
    if len(stages) > 1 or not values["share_embeddings_and_output_weights"]:
        counts[-1] += embedding
    return list(zip(stages, counts, strict=True))


def _layers(values: dict[str, Any], parallel: Parallel) -> list[int]:
    """Parameters of each layer on a rank."""
    norm = _norm(values, values["hidden_size"]) * values["pre_norms"]
    attention = norm + _attention(values, parallel.tensor)
    mlp = norm + _mlp(values, values["ffn_hidden_size"], parallel.tensor)
    experts = norm + _experts(values, parallel) if values["num_moe_experts"] else 0
    if not (letters := values["hybrid_layer_pattern"]):
        attention += 2 * values["post_norms"] * _norm(values, values["hidden_size"])
        delta_net = norm + _delta_net(values, parallel.tensor)
        return [
            (delta_net if recurrent else attention) + (experts if moe else mlp)
            for recurrent, moe in zip(delta_nets(values), moe_layers(values), strict=True)
        ]
    mamba = norm + _mamba(values, parallel.tensor)
    parts = {"M": mamba, "*": attention, "-": mlp, "E": experts}
    return [parts[letter] for letter in letters]


def _mamba(values: dict[str, Any], ranks: int) -> int:
    """A Mamba-2 layer without the norm before it; all but the norm's is divided over ranks."""
    hidden, heads = values["hidden_size"], values["mamba_num_heads"]
    inner = heads * values["mamba_head_dim"]
    mixed = inner + 2 * values["mamba_num_groups"] * values["mamba_state_dim"]
    count = _column(hidden, inner + mixed + heads, ranks) + _row(inner, hidden, ranks, bias=False)
    # Kernels and biases of the convolution; decay, skip and bias of each head; the gated norm.
    return count + (mixed * (_CONVOLVED + 1) + 3 * heads + inner) // ranks


def _delta_net(values: dict[str, Any], ranks: int) -> int:
    """A gated delta net without the norm before it; all but the norm's is divided over ranks."""
    hidden, heads = values["hidden_size"], values["linear_num_value_heads"]
    keys = values["linear_num_key_heads"] * values["linear_key_head_dim"]
    inner = heads * values["linear_value_head_dim"]
    mixed = 2 * keys + inner
    count = _column(hidden, mixed + inner + 2 * heads, ranks)
    count += _row(inner, hidden, ranks, bias=False) + values["linear_value_head_dim"]
    # Kernels of the convolution; decay and bias of each head.
    return count + (mixed * values["linear_conv_kernel_dim"] + 2 * heads) // ranks


def delta_nets(values: dict[str, Any]) -> list[bool]:
    """Whether each layer has a gated delta net in place of attention."""
    layers, found = values["num_layers"], values["linear_attention_freq"]
    if not values["experimental_attention_variant"]:
        return [False] * layers
    if not isinstance(found, list) or len(found) != layers:
        raise UsageError(
            f"--linear-attention-freq {found}",
            f"it has to say which of the {layers} layers have a gated delta net",
            "give a number n, for attention in each n-th layer, or one entry for each layer",
        )
    return [bool(each) for each in found]


def moe_layers(values: dict[str, Any]) -> list[bool]:
    """Whether each layer has experts; ``moe_layer_freq`` is read as megatron-core does."""
    layers, frequency = values["num_layers"], values["moe_layer_freq"]
    if not values["num_moe_experts"]:
        return [False] * layers
    if isinstance(frequency, int):
        return [index % frequency == 0 for index in range(layers)]
    if len(frequency) != layers:
        raise UsageError(
            f"--moe-layer-freq with {len(frequency)} entries",
            f"the model has {layers} layers",
            "give one entry for each layer",
        )
    return [bool(entry) for entry in frequency]


def _norm(values: dict[str, Any], size: int) -> int:
    return size * (2 if values["normalization"] == "LayerNorm" else 1)


def _column(inputs: int, outputs: int, ranks: int, bias: bool = False) -> int:
    """A linear layer whose outputs, and their bias, are divided over ranks."""
    return (inputs * outputs + (outputs if bias else 0)) // ranks


def _row(inputs: int, outputs: int, ranks: int, bias: bool) -> int:
    """A linear layer whose inputs are divided over ranks; each has the whole bias."""
    return inputs * outputs // ranks + (outputs if bias else 0)


def _attention(values: dict[str, Any], ranks: int) -> int:
    """Attention of a layer without the norm before it."""
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    bias = values["add_bias_linear"]
    count = 0
    if values["softmax_type"] == "learnable":
        count += heads // ranks
    if values["multi_latent_attention"]:
        return count + _latent_attention(values, ranks)
    size, groups = values["kv_channels"], values["num_query_groups"]
    queries = heads * size * (2 if values["attention_output_gate"] else 1)
    if values["full_width_qk_norms"]:
        count += _norm(values, (heads + groups) * size // ranks)
    elif values["qk_layernorm"] and not values["qk_l2_norm"]:
        count += 2 * _norm(values, size)
    count += _column(hidden, queries + 2 * groups * size, ranks, bias or values["add_qkv_bias"])
    return count + _row(heads * size, hidden, ranks, bias)


def _latent_attention(values: dict[str, Any], ranks: int) -> int:
    """Multi-latent attention without its input norm; the down projections are not divided."""
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    key, position = values["qk_head_dim"], values["qk_pos_emb_head_dim"]
    value = values["v_head_dim"]
    rank, query_rank = values["kv_lora_rank"], values["q_lora_rank"]
    count = hidden * (rank + position) + _norm(values, rank)
    count += _column(rank, heads * (key + value), ranks)
    count += _row(heads * value, hidden, ranks, values["add_bias_linear"])
    if query_rank:
        count += hidden * query_rank + _norm(values, query_rank)
    return count + _column(query_rank or hidden, heads * (key + position), ranks)


def _experts(values: dict[str, Any], parallel: Parallel) -> int:
    """Router, this rank's experts, the shared expert, and the way to the experts' latent size."""
    hidden, latent = values["hidden_size"], values["moe_latent_size"]
    bias = bool(values["add_bias_linear"])
    count = values["num_moe_experts"] * (hidden + bias)
    if latent:
        count += 2 * hidden * latent + (hidden + latent) * bias
    of_expert = {**values, "hidden_size": latent or hidden}
    expert = _mlp(of_expert, values["moe_ffn_hidden_size"], parallel.expert_tensor)
    count += values["num_moe_experts"] // parallel.expert * expert
    shared = values["moe_shared_expert_intermediate_size"]
    gate = hidden * values["moe_shared_expert_gate"]
    return count + (_mlp(values, shared, parallel.tensor) + gate if shared else 0)


def _mlp(values: dict[str, Any], inner: int, ranks: int) -> int:
    hidden, bias = values["hidden_size"], values["add_bias_linear"]
    rows = inner * (2 if values["gated_linear_unit"] else 1)
    return _column(hidden, rows, ranks, bias) + _row(inner, hidden, ranks, bias)
