"""Dense layers first, then experts with shared ones beside them: DeepSeek's and GLM-4.5's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from post_training.models.families.base import Family, check_groups, is_further_layer, refuse

KEYS = {
    "num_moe_experts": "n_routed_experts",
    "moe_router_topk": "num_experts_per_tok",
    "moe_router_topk_scaling_factor": "routed_scaling_factor",
    "moe_ffn_hidden_size": "moe_intermediate_size",
}
CONSTANTS = {"moe_router_pre_softmax": True, "moe_router_dtype": "fp32"}


@dataclass(frozen=True, kw_only=True)
class SharedExperts(Family):
    """A token chooses experts, of some groups or of all, and has the shared ones besides.

    Attributes:
        score: of the router.
        has_bias: whether the router adds a bias to the scores that it chooses by.
        group_experts: how many experts decide which groups a token may choose from.
        methods: values of ``topk_method``, the default first.
    """

    score: str
    has_bias: bool
    group_experts: int
    methods: tuple[str, ...]

    def check(self, config: Mapping[str, Any]) -> None:
        super().check(config)
        chosen = config["num_experts_per_tok"]
        if not 1 <= chosen <= config["n_routed_experts"]:
            refuse(f"num_experts_per_tok = {chosen}", "there are not so many experts")
        if config["first_k_dense_replace"] >= config["num_hidden_layers"]:
            refuse("first_k_dense_replace", "no layer has experts")
        if not config["n_shared_experts"]:
            refuse("n_shared_experts", "a model without shared experts")
        normalized = self.score == "sigmoid" and chosen > 1
        if config["norm_topk_prob"] != normalized:
            refuse(
                f"norm_topk_prob = {config['norm_topk_prob']!r}",
                f"megatron-core {'normalizes' if normalized else 'does not normalize'} the weights "
                f"of {chosen} experts with {self.score} scores",
            )
        groups = self._groups(config)
        if groups:
            check_groups(config["n_routed_experts"], *groups, ranked=self.group_experts)
        if groups and chosen // groups[1] != self.group_experts:
            refuse(
                f"topk_group = {groups[1]} of {groups[0]} with num_experts_per_tok = {chosen}",
                f"the model ranks groups by their {self.group_experts} best experts, "
                f"megatron-core by {chosen // groups[1]} (num_experts_per_tok / topk_group)",
            )

    def _groups(self, config: Mapping[str, Any]) -> tuple[int, int] | None:
        """Groups of experts, and from how many of them a token chooses; None: from all."""
        method = config.get("topk_method", self.methods[0])
        if method not in self.methods:
            refuse(f"topk_method = {method!r}", f"known are {', '.join(self.methods)}")
        if method == "greedy":
            return None
        groups, chosen = config.get("n_group") or 1, config.get("topk_group") or 1
        return None if chosen >= groups else (groups, chosen)

    def transformer(self, config: Mapping[str, Any]) -> dict[str, Any]:
        dense, layers = config["first_k_dense_replace"], config["num_hidden_layers"]
        values = super().transformer(config) | {
            "moe_layer_freq": [0] * dense + [1] * (layers - dense),
            "moe_shared_expert_intermediate_size": config["n_shared_experts"]
            * config["moe_intermediate_size"],
            "moe_router_score_function": self.score,
            "moe_router_enable_expert_bias": self.has_bias,
        }
        if groups := self._groups(config):
            values["moe_router_num_groups"], values["moe_router_group_topk"] = groups
        return values

    def with_shape(
        self,
        config: Mapping[str, Any],
        values: Mapping[str, Any],
        kept_layers: Sequence[int] | None = None,
    ) -> dict[str, Any]:
        changed = super().with_shape(config, values, kept_layers)
        frequency = values["moe_layer_freq"]
        dense = self.defaults["first_k_dense_replace"]
        if isinstance(frequency, list) and config.get("first_k_dense_replace", dense) != (
            kept := len(frequency) - sum(frequency)
        ):
            changed["first_k_dense_replace"] = kept
        shared, each = values["moe_shared_expert_intermediate_size"], values["moe_ffn_hidden_size"]
        if shared % each:
            refuse(
                f"moe_intermediate_size = {each}",
                f"the shared experts have {shared}, which must be a multiple of it",
                "prune moe_ffn_hidden_size to a divisor, or leave both as they are",
            )
        if config.get("n_shared_experts", self.defaults["n_shared_experts"]) != shared // each:
            changed["n_shared_experts"] = shared // each
        return changed

    def is_carried(self, config: Mapping[str, Any], name: str) -> bool:
        """Layers after the last, which predict further tokens (``num_nextn_predict_layers``)."""
        return is_further_layer(config, name)
