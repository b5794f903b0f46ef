"""Fused routing of mixture-of-experts models: not available; megatron-core's own code routes.

extensions/transformer_engine.py:3559 imports the three names without ``try`` for any version from
2.7.0 on; megatron-core calls them only with ``moe_router_fusion``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn


def _refused(name: str) -> Callable[..., NoReturn]:
    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            f"{name}: the pure-PyTorch stand-in for Transformer Engine has no fused router; "
            "set moe_router_fusion=False"
        )

    return refuse


fused_topk_with_score_function = _refused("fused_topk_with_score_function")
fused_compute_score_for_moe_aux_loss = _refused("fused_compute_score_for_moe_aux_loss")
fused_moe_aux_loss = _refused("fused_moe_aux_loss")
