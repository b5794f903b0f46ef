"""Fused routing of mixture-of-experts models: not available; megatron-core's own code routes.

megatron-core imports the names whatever its configuration, and calls them only with
``moe_router_fusion``.
"""

from __future__ import annotations

from typing import Any, NoReturn

__all__ = [
    "fused_compute_score_for_moe_aux_loss",
    "fused_moe_aux_loss",
    "fused_topk_with_score_function",
]


def _refuse(name: str) -> NoReturn:
    raise NotImplementedError(
        f"{name}: the pure-PyTorch stand-in for Transformer Engine has no fused router; "
        "set moe_router_fusion=False"
    )


def fused_topk_with_score_function(*args: Any, **kwargs: Any) -> NoReturn:
    _refuse("fused_topk_with_score_function")


def fused_compute_score_for_moe_aux_loss(*args: Any, **kwargs: Any) -> NoReturn:
    _refuse("fused_compute_score_for_moe_aux_loss")


def fused_moe_aux_loss(*args: Any, **kwargs: Any) -> NoReturn:
    _refuse("fused_moe_aux_loss")
