"""Where a search for an architecture looks, and what an architecture takes.

Sizes are computed by ModelOpt from the configuration alone, so that thousands of candidates can be
compared, and a target out of reach is refused, before any weight is loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron.core.transformer import MegatronModule, TransformerConfig
from modelopt.torch.nas.plugins import megatron_model_stats as stats

from post_training.common.errors import UsageError
from post_training.models.architecture import Architecture
from post_training.pruning.options import Memory, SizeSearch
from post_training.pruning.space import Dimension

logger = logging.getLogger("post_training")

MEBIBYTE = 1 << 20
_WEIGHT_BYTES = 2


@dataclass(frozen=True)
class Size:
    """Parameters, those used for one token, and bytes of weights and cache."""

    parameters: int
    active_parameters: int
    weight_bytes: int
    cache_bytes: int

    @property
    def limited(self) -> dict[str, int]:
        """What a search may limit."""
        return {
            "params": self.parameters,
            "active_params": self.active_parameters,
            "memory": self.weight_bytes + self.cache_bytes,
        }

    def __str__(self) -> str:
        return ", ".join(f"{name} = {value:,}" for name, value in self.limited.items()) + " bytes"

    def meets(self, limits: Mapping[str, float]) -> bool:
        """Whether it is within every limit of a search."""
        return all(self.limited[name] <= limit for name, limit in limits.items())


def size(
    architecture: Architecture, config: TransformerConfig, memory: Memory, **changes: int
) -> Size:
    """What a model takes, with ``changes`` to its hyper-parameters; computed, not measured."""
    values = {**architecture.resolved(), **changes}
    described = (
        architecture.vocab_size,
        architecture.share_embeddings_and_output_weights,
        architecture.hybrid_layer_pattern,
    )
    total, active = stats.mcore_param_count(config, *described, **changes)
    weights, cached, state, _ = stats.mcore_memory_footprint_mb(
        config,
        *described,
        sequence_length=memory.sequence_length,
        batch_size=memory.batch_size,
        **changes,
    )
    more = 0
    if values["add_qkv_bias"] and not values["add_bias_linear"]:
        # ModelOpt counts biases of all linears or of none.
        rows = values["num_attention_heads"] + 2 * values["num_query_groups"]
        more = rows * values["kv_channels"] * values["num_layers"]
    return Size(
        total + more,
        active + more,
        round(weights * MEBIBYTE) + more * _WEIGHT_BYTES,
        round((cached + state) * MEBIBYTE),
    )


def counted(model: MegatronModule, computed: Size) -> Size:
    """``computed`` with the parameters that the model really has; a collective call."""
    # Not model.count_parameters: after dropping layers the stages may hold unequal numbers.
    actual = stats.mcore_param_count_live(model)
    if actual != computed.parameters:
        logger.warning(
            f"{computed.parameters:,} parameters were computed for this architecture, it has "
            f"{actual:,}: a search may miss its target by as much"
        )
    more = actual - computed.parameters
    return replace(
        computed,
        parameters=actual,
        active_parameters=computed.active_parameters + more,
        weight_bytes=computed.weight_bytes + more * _WEIGHT_BYTES,
    )


def check_reachable(
    architecture: Architecture,
    config: TransformerConfig,
    allowed: Mapping[str, Dimension],
    search: SizeSearch,
) -> None:
    """Raise UsageError if the limits are met already, or by no architecture of the search."""
    smallest = {}
    for name, each in allowed.items():
        share = search.max_depth if name == "num_layers" else search.max_width
        # A hybrid model's size depends on which layers go.
        undecided = name == "num_layers" and architecture.hybrid_layer_pattern
        if len(each.choices) > 1 and name not in search.skip and not undecided:
            smallest[name] = each.choices[int((1 - share) * len(each.choices))]
    least = size(architecture, config, search.memory, **smallest)
    whole = size(architecture, config, search.memory)
    limits = ", ".join(f"{name} <= {limit:,.0f}" for name, limit in search.limits.items())
    what = f"the target {limits}"
    if whole.meets(search.limits):
        raise UsageError(what, f"the model meets it already: {whole}", "give a smaller target")
    if not least.meets(search.limits):
        raise UsageError(
            what,
            f"the smallest architecture of the search has {least}: {smallest}",
            f"give a larger target, raise --prune-max-width-pruning {search.max_width} or "
            f"--prune-max-depth-pruning {search.max_depth}, or name the widths with "
            "--prune-export-config",
        )


def acceptance(
    architecture: Architecture,
    config: TransformerConfig,
    allowed: Mapping[str, Dimension],
    target: Mapping[str, int] | SizeSearch,
) -> Callable[[Mapping[str, Any]], bool]:
    """What a candidate of ModelOpt's must meet too: it knows no top-k and no biases of q, k, v.

    The function takes a candidate's hyper-parameters by name, other names being skipped.
    """

    def accept(candidate: Mapping[str, Any]) -> bool:
        found = {name: value for name, value in candidate.items() if allowed[name].choices}
        if any(value not in allowed[name].choices for name, value in found.items()):
            return False
        if not isinstance(target, SizeSearch) or architecture.hybrid_layer_pattern:
            return True
        return size(architecture, config, target.memory, **found).meets(target.limits)

    return accept
