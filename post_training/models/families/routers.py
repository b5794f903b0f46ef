"""What a router of experts must be for megatron-core to compute it. No torch."""

from __future__ import annotations

from typing import Any

from post_training.models.families.refusal import refuse


def check_router(experts: Any, chosen: Any, *, normalized: bool) -> None:
    """Raise UsageError unless each token chooses some of the experts.

    Args:
        normalized: the weights of the chosen ones sum to 1.
    """
    if not isinstance(experts, int) or not 1 <= chosen <= experts:
        refuse(f"num_experts = {experts!r}", f"each token needs {chosen} of them")
    if normalized and chosen == 1:
        refuse("num_experts_per_tok = 1", "megatron-core does not weigh a single expert with 1")


def check_groups(experts: int, groups: int, chosen: int, ranked: int) -> None:
    """Raise UsageError unless a token can choose ``chosen`` of the groups of experts.

    Args:
        ranked: how many of a group's experts decide its rank.
    """
    if groups < 1 or experts % groups or experts // groups < ranked or not 1 <= chosen <= groups:
        refuse(
            f"n_group = {groups}, topk_group = {chosen} of {experts} experts",
            f"equal groups of at least {ranked} are needed, and some of them chosen",
        )
