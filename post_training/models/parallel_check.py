"""Whether a model can be divided over parallel groups of given sizes. No torch."""

from __future__ import annotations

import math

from post_training.common.errors import UsageError
from post_training.distributed.parallel import Parallel
from post_training.models.architecture import Architecture

_MOST_NAMED = 1024  # the largest size that a message proposes


def check(architecture: Architecture, parallel: Parallel) -> None:
    """Raise UsageError, naming both numbers, if the model cannot be divided this way."""
    values, recurrent = architecture.resolved(), architecture.has_delta_nets
    _divides("TP", parallel.tensor, {
        "attention heads": values["num_attention_heads"],
        "query groups": None if values["multi_latent_attention"] else values["num_query_groups"],
        "FFN size": values["ffn_hidden_size"],
        "vocabulary": values["vocab_size"],
        "Mamba heads": values["mamba_num_heads"],
        "Mamba groups": values["mamba_num_groups"] if architecture.is_hybrid else None,
        "key heads of gated delta nets": values["linear_num_key_heads"] if recurrent else None,
    })  # fmt: skip
    _divides("EP", parallel.expert, {"experts": values["num_moe_experts"]})
    if values["num_moe_experts"] and values["add_bias_linear"] and parallel.expert_tensor > 1:
        raise UsageError(
            f"ETP={parallel.expert_tensor}",
            "the experts have biases, which megatron-core does not divide over ranks",
            "set ETP=1, also at TP > 1: attention is then divided by TP, and experts by EP alone",
        )
    if values["num_moe_experts"]:
        _divides(
            "ETP", parallel.expert_tensor, {"experts' FFN size": values["moe_ffn_hidden_size"]}
        )
    elif parallel.expert > 1:
        raise UsageError(f"EP={parallel.expert}", "the model has no experts", "EP=1")
    if parallel.context > 1 and (values["attention_chunks"] or values["attention_temperature"]):
        raise UsageError(
            f"CP={parallel.context}",
            "attention within chunks, or with a temperature by position, needs the whole text",
            "CP=1",
        )
    if parallel.context > 1 and recurrent:
        raise UsageError(
            f"CP={parallel.context}", "gated delta nets are not divided over a text here", "CP=1"
        )
    layers_per_stage(values["num_layers"], parallel)


def layers_per_stage(layers: int, parallel: Parallel) -> list[int]:
    """Layers of each pipeline stage, first to last; UsageError if one would get a part or none."""
    stages, first, last = parallel.pipeline, parallel.first_layers, parallel.last_layers
    if stages == 1:
        if first not in (None, layers) or last not in (None, layers):
            raise UsageError(
                f"--decoder-first-pipeline-num-layers {first} --decoder-last-... {last}",
                f"with PP=1 the only stage has all {layers} layers",
                "leave them out, or set PP",
            )
        return [layers]
    before, after = [[] if n is None else [n] for n in (first, last)]
    fixed = before + after
    middle, rest = stages - len(fixed), layers - sum(fixed)
    each = rest // middle if middle else 0
    # A PP of billions must not become a list of so many.
    found = before + [each] * min(middle, layers) + after
    if min(found) < 1 or sum(found) != layers:
        detail = f" ({first or 'even'} first, {last or 'even'} last)" if fixed else ""
        raise UsageError(
            f"PP={stages}",
            f"{rest} layers{' of ' + str(layers) if fixed else ''} cannot be spread evenly over "
            f"{middle} pipeline stages{detail}",
            "choose a PP that divides the layers, or set the layers of the first and last stage "
            "with --decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers",
        )
    return found


def _divides(name: str, size: int, counts: dict[str, int | None]) -> None:
    wrong = [f"{count} {what}" for what, count in counts.items() if count and count % size]
    if wrong:
        common = math.gcd(*(count for count in counts.values() if count))
        good = [n for n in range(1, min(size, _MOST_NAMED + 1)) if common % n == 0]
        raise UsageError(
            f"{name}={size}",
            f"it does not divide the model's {', '.join(wrong)}",
            f"{name} can be {', '.join(map(str, good))}",
        )
