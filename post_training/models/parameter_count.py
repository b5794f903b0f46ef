"""How many parameters a model has, in total and on each rank, without building it. No torch.

Counts what megatron-core 0.19 allocates for ModelOpt's layer spec (``builder.py``): a linear layer
is split over the tensor-parallel ranks along one dimension, an expert over the expert-tensor-
parallel ranks; norms, routers and multi-latent attention's down projections are replicated. Tests
compare the counts with built models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from post_training.common.errors import UsageError
from post_training.distributed.parallel import Parallel
from post_training.models.architecture import Architecture
from post_training.models.parallel_check import layers_per_stage

# Fields whose parameters are not counted here; a model with one of them is refused.
_UNKNOWN = (
    "mtp_num_layers moe_latent_size experimental_attention_variant linear_attention_freq "
    "heterogeneous_block_specs is_hybrid_model moe_shared_expert_gate hybrid_layer_pattern"
).split()


@dataclass(frozen=True)
class PipelineStage:
    """A pipeline stage: its layers, and the parameters on each of its ranks."""

    layers: int
    parameters: int


def total(architecture: Architecture) -> int:
    """Parameters of the whole model; tied embeddings count once.

    Raises:
        UsageError: if the model has a part that is not counted here, by name.
    """
    return per_stage(architecture, Parallel())[0].parameters


def per_stage(architecture: Architecture, parallel: Parallel) -> list[PipelineStage]:
    """The pipeline stages, first to last; all ranks of a stage hold equally many parameters.

    Tied embeddings count on the first and on the last stage, as megatron-core allocates them.

    Raises:
        UsageError: as :func:`total`, or if the layers cannot be spread over the stages.
    """
    values = architecture.resolved()
    unknown = [name for name in _UNKNOWN if values[name]]
    if unknown or architecture.model_type != "GPTModel":
        raise UsageError(
            ", ".join(f"{name} = {values[name]}" for name in unknown) or architecture.model_type,
            "parameters of such a model are not counted yet",
            "leave --dry-run out, or take a model without it",
        )
    pattern = moe_layers(values)
    stages = layers_per_stage(values["num_layers"], parallel)
    dense = _attention(values, parallel) + _mlp(values, parallel)
    sparse = dense
    if any(pattern):
        sparse = _attention(values, parallel) + _experts(values, parallel)
    embedding = values["vocab_size"] * values["hidden_size"] // parallel.tensor
    found, first = [], 0
    for index, layers in enumerate(stages):
        count = sum(sparse if moe else dense for moe in pattern[first : first + layers])
        first += layers
        is_first, is_last = index == 0, index == len(stages) - 1
        if is_first:
            count += embedding
            if values["position_embedding_type"] == "learned_absolute":
                count += values["max_position_embeddings"] * values["hidden_size"]
        if is_last:
            count += _norm(values, values["hidden_size"])
            tied_here = values["share_embeddings_and_output_weights"] and is_first
            count += 0 if tied_here else embedding
        found.append(PipelineStage(layers, count))
    return found


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


def _attention(values: dict[str, Any], parallel: Parallel) -> int:
    """Attention of a layer with the norm before it, on one rank."""
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    bias = hidden if values["add_bias_linear"] else 0
    count = _norm(values, hidden) + bias
    if values["softmax_type"] == "learnable":
        count += heads // parallel.tensor
    if values["multi_latent_attention"]:
        return count + _latent_attention(values, parallel)
    size, groups = values["kv_channels"], values["num_query_groups"]
    queries = heads * size * (2 if values["attention_output_gate"] else 1)
    keys_and_values = 2 * groups * size
    split = hidden * (queries + keys_and_values) + heads * size * hidden
    if values["add_bias_linear"] or values["add_qkv_bias"]:
        split += queries + keys_and_values
    if values["qk_layernorm"] and not values["qk_l2_norm"]:
        count += 2 * _norm(values, size)
    return count + split // parallel.tensor


def _latent_attention(values: dict[str, Any], parallel: Parallel) -> int:
    """Multi-latent attention without its input norm and output bias, on one rank."""
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    query = values["qk_head_dim"] + values["qk_pos_emb_head_dim"]
    rank, query_rank = values["kv_lora_rank"], values["q_lora_rank"]
    whole = hidden * (rank + values["qk_pos_emb_head_dim"]) + _norm(values, rank)
    split = rank * heads * (values["qk_head_dim"] + values["v_head_dim"])
    split += heads * values["v_head_dim"] * hidden
    if query_rank:
        whole += hidden * query_rank + _norm(values, query_rank)
        split += query_rank * heads * query
    else:
        split += hidden * heads * query
    return whole + split // parallel.tensor


def _mlp(values: dict[str, Any], parallel: Parallel) -> int:
    """A dense MLP with the norm before it, on one rank."""
    split, whole = _feed_forward(values, values["ffn_hidden_size"])
    return _norm(values, values["hidden_size"]) + whole + split // parallel.tensor


def _experts(values: dict[str, Any], parallel: Parallel) -> int:
    """Router, this rank's experts and the shared expert, with the norm before them."""
    hidden = values["hidden_size"]
    split, whole = _feed_forward(values, values["moe_ffn_hidden_size"])
    each = whole + split // parallel.expert_tensor
    router = values["num_moe_experts"] * (hidden + (1 if values["add_bias_linear"] else 0))
    count = _norm(values, hidden) + router
    count += values["num_moe_experts"] // parallel.expert * each
    shared = values["moe_shared_expert_intermediate_size"]
    if shared:
        split, whole = _feed_forward(values, shared)
        count += whole + split // parallel.tensor
    return count


def _feed_forward(values: dict[str, Any], inner: int) -> tuple[int, int]:
    """Parameters of two linear layers: those split over ranks, and the replicated ones."""
    hidden = values["hidden_size"]
    rows = inner * (2 if values["gated_linear_unit"] else 1)
    biased = values["add_bias_linear"]
    return rows * hidden + inner * hidden + (rows if biased else 0), hidden if biased else 0
