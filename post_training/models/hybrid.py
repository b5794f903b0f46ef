"""megatron-core's model of Mamba, attention and MLP layers, and the states of its Mamba layers."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.post_training.modelopt.hybrid.model_specs import get_hybrid_stack_modelopt_spec
from megatron.core.ssm.mamba_mixer import MambaMixer

from post_training.models.architecture import Architecture
from post_training.models.recurrent_states import RecurrentStates
from post_training.portable import mamba

logger = logging.getLogger(__name__)


class CachingMambaMixer(MambaMixer):
    """Generates with a static cache, whose states are float32 and belong to the cache alone.

    megatron-core keeps the scan's state in the weights' dtype, starts from zeros whenever the batch
    has another size than the layer saw last, also in the middle of a text, and takes the sequences
    of a batch for the tokens of one sequence.
    """

    def _get_states_from_cache(
        self, inference_context: Any, batch_size: int, *, inference_params: Any = None
    ) -> RecurrentStates:
        memory = inference_context.key_value_memory_dict
        if inference_context.sequence_len_offset == 0:
            weight = self.conv1d_weight
            convolution, scan = self.mamba_state_shapes_per_request()
            memory[self.layer_number] = RecurrentStates(
                weight.new_zeros(batch_size, *convolution),
                weight.new_zeros(batch_size, *scan, dtype=torch.float32),
            )
        found: RecurrentStates = memory[self.layer_number]
        return found

    def row_parts(self, linear: str) -> dict[str, int]:
        """This rank's rows of each part of a linear, which ranks divide part by part."""
        states = self.ngroups_local_tp * self.d_state
        inner = self.d_inner_local_tp
        return {"z": inner, "x": inner, "B": states, "C": states, "dt": self.nheads_local_tp}

    def _decode(
        self,
        hidden_states: torch.Tensor,
        conv_state: torch.Tensor,
        ssm_state: torch.Tensor,
        batch_indices: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Hidden states [s, b, d_model] of further tokens to the layer's output for them."""
        projected, _ = self.in_proj(hidden_states)
        y = self._ssm_decode(
            projected.transpose(0, 1).contiguous(), conv_state=conv_state, ssm_state=ssm_state
        )
        output: tuple[torch.Tensor, torch.Tensor | None] = self.out_proj(y.transpose(0, 1))
        return output


def build(architecture: Architecture, config: Any, options: Any) -> HybridModel:
    """This rank's part of the model; the arguments are those of ``builder``'s model types."""
    reason = mamba.why_not()
    where = f"in PyTorch: {reason}" if reason else f"on {mamba.PACKAGE}'s kernels in 16 bits"
    logger.info("Mamba layers run %s", where)
    spec = copy.deepcopy(
        get_hybrid_stack_modelopt_spec(
            local_core_attention=options.local_attention,
            remap_te_layernorm=options.transformer_engine_keys,
            use_default_te_spec=options.layer_spec == "transformer_engine",
            moe_grouped_gemm=False,
        )
    )
    spec.submodules.mamba_layer.submodules.mixer.module = CachingMambaMixer
    return HybridModel(
        config=config,
        hybrid_stack_spec=spec,
        vocab_size=architecture.vocab_size,
        max_sequence_length=architecture.max_position_embeddings,
        hybrid_layer_pattern=architecture.hybrid_layer_pattern,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        # As in GPTModel, see builder.py.
        parallel_output=True,
        share_embeddings_and_output_weights=architecture.share_embeddings_and_output_weights,
        position_embedding_type=architecture.position_embedding_type,
        rotary_percent=architecture.rotary_percent,
        rotary_base=architecture.rotary_base,
    )
