"""What megatron-core's own classes do not compute, given to a built model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from post_training.models import expert_outputs
from post_training.models.architecture import Architecture

if TYPE_CHECKING:
    from megatron.core.transformer import MegatronModule


def complete(model: MegatronModule, architecture: Architecture) -> None:
    """Change ``model``, this rank's part, into one of the architecture."""
    expert_outputs.weigh(model)
    if architecture.rope_parameters is not None:
        from post_training.models import rotary

        rotary.scale(model, architecture)
    if architecture.local_rotary_base is not None:
        from post_training.models import local_rotary

        local_rotary.attach(model, architecture.local_rotary_base)
    if architecture.full_width_qk_norms:
        from post_training.models import full_width_norms

        full_width_norms.attach(model)
    if architecture.post_norms:
        from post_training.models import post_norms

        post_norms.attach(model)
    if architecture.multipliers is not None:
        from post_training.models import multipliers

        multipliers.attach(model, architecture.multipliers)
    if (
        architecture.attention_chunks
        or architecture.attention_temperature
        or architecture.value("qk_l2_norm")
    ):
        from post_training.models import llama4_attention

        llama4_attention.attach(model, architecture)
