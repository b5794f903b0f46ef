"""Qwen3-Next: gated delta nets, and Qwen3-MoE's experts beside a shared one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from post_training.models.families import gated_delta
from post_training.models.families.base import DECODER_KEYS, NO_ATTENTION_BIAS, ONLY_SILU
from post_training.models.families.gated_delta import DeltaNets
from post_training.models.families.qwen_moe import Qwen3Moe


class Qwen3Next(DeltaNets, Qwen3Moe):
    """Its files have the rows of a key head together."""

    def divided(self, values: Mapping[str, Any]) -> Mapping[str, Mapping[str, Sequence[int]]]:
        sizes = _Sizes.of(values)
        both = [sizes.of_head(head) for head in range(sizes.heads)]
        return {
            "in_proj": {"in_proj_qkvz": [row for large, _ in both for row in large]},
            "in_proj_ba": {"in_proj_ba": [row for _, small in both for row in small]},
        }


class _Sizes(NamedTuple):
    """Of a gated delta net: heads of keys, the size of one, its value heads and their size."""

    heads: int
    key: int
    repeats: int
    value: int

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> _Sizes:
        heads = values["linear_num_key_heads"]
        repeats = values["linear_num_value_heads"] // heads
        return cls(heads, values["linear_key_head_dim"], repeats, values["linear_value_head_dim"])

    def of_head(self, head: int) -> tuple[list[int], list[int]]:
        """Rows of query, key, values and gates of a key head; rows of its betas and alphas."""
        queries, of_values = self.heads * self.key, self.repeats * self.value
        values = self.heads * of_values
        starts = {0: self.key, queries: self.key, 2 * queries: of_values}
        starts[2 * queries + values] = of_values
        large = [start + head * size + n for start, size in starts.items() for n in range(size)]
        small = [
            start + head * self.repeats + n
            for start in (0, self.heads * self.repeats)
            for n in range(self.repeats)
        ]
        return large, small


FAMILIES = (
    Qwen3Next(
        name="qwen3-next",
        architecture="Qwen3NextForCausalLM",
        keys={
            **DECODER_KEYS,
            **gated_delta.KEYS,
            "moe_ffn_hidden_size": "moe_intermediate_size",
            "moe_router_topk": "num_experts_per_tok",
            "moe_shared_expert_intermediate_size": "shared_expert_intermediate_size",
        },
        constants={**gated_delta.CONSTANTS, "moe_shared_expert_gate": True},
        defaults={
            **gated_delta.DEFAULTS,
            "num_key_value_heads": 2,
            "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512,
            "num_experts": 512,
            "num_experts_per_tok": 10,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
        },
        refused=(ONLY_SILU, NO_ATTENTION_BIAS),
        parts=frozenset({"experts", "gated delta nets"}),
        partial_rotary=True,
        not_pruned=gated_delta.NOT_PRUNED,
        tiny={
            "model_type": "qwen3_next",
            **gated_delta.TINY,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 128,
            "shared_expert_intermediate_size": 256,
            "mlp_only_layers": [2],
        },
    ),
)
