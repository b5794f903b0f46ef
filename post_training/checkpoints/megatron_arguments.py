"""The arguments that Megatron-LM reads back from a checkpoint (``--use-checkpoint-args``).

Megatron-LM pickles its own ``argparse.Namespace`` into a checkpoint, so ours must be one too.
"""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING, Any

from post_training.models.architecture import Architecture

if TYPE_CHECKING:
    from megatron.core.transformer import MegatronModule


def megatron_lm_arguments(architecture: dict[str, Any], model: MegatronModule) -> Namespace:
    """The model's arguments under Megatron-LM's names."""
    described = Architecture.from_json(architecture)
    config = model.config
    return Namespace(
        **{
            name: value
            for name, value in described.transformer.items()
            if isinstance(value, (int, float, str, bool, list, type(None)))
        },
        padded_vocab_size=described.vocab_size,
        max_position_embeddings=described.max_position_embeddings,
        seq_length=described.max_position_embeddings,
        position_embedding_type=described.position_embedding_type,
        rotary_base=described.rotary_base,
        rotary_percent=described.rotary_percent,
        use_rope_scaling=described.rope_scaling,
        untie_embeddings_and_output_weights=not described.share_embeddings_and_output_weights,
        swiglu=bool(config.gated_linear_unit),
        group_query_attention=config.num_query_groups != config.num_attention_heads,
        bf16=config.bf16,
        fp16=config.fp16,
        params_dtype=config.params_dtype,
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
        consumed_train_samples=0,
        ckpt_format="torch_dist",
    )
