"""Flags that select kernels of Transformer Engine, where only its stand-in runs.

Such a kernel computes what others do. Megatron-LM's confs ask for some; megatron-core then refuses
the model, or raises in its forward pass.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any

logger = logging.getLogger("post_training")

_FIELDS = frozenset(
    """
    use_te_activation_func use_transformer_engine_op_fuser apply_rope_fusion fused_single_qkv_rope
    moe_router_fusion moe_permute_fusion cpu_offloading
    """.split()
)


def possible(fields: Mapping[str, Any]) -> dict[str, Any]:
    """``fields`` of megatron-core's configuration without those that have no kernel here."""
    from post_training import portable

    unused = sorted(name for name in _FIELDS & fields.keys() if fields[name])
    if unused and not portable.install().real_transformer_engine:
        _tell(tuple(unused))
        return {name: value for name, value in fields.items() if name not in unused}
    return dict(fields)


@functools.cache
def _tell(names: tuple[str, ...]) -> None:
    flags = ", ".join(f"--{name.replace('_', '-')}" for name in names)
    logger.info("without effect, since Transformer Engine is missing: %s", flags)
