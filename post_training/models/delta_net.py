"""Gated delta nets: megatron-core's, with states to generate from and linears as files have them.

Qwen3-Next and Qwen3.5 have them in place of attention in most layers. megatron-core has one linear
for queries, keys, values, gates and the two numbers of each head that decide how much is forgotten
and written. Engines keep the linear of the latter in 16 bits, so it is one of its own here; and
megatron-core does not generate.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules, common
from megatron.core.ssm.utils import _split_tensor_factory
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch.nn import functional

from post_training.models.recurrent_states import RecurrentStates
from post_training.portable import delta_rule

logger = logging.getLogger(__name__)

_NORM, _FUSED_NORM = "input_layernorm.", "self_attention.in_proj.layer_norm_"


class PlainLinear(ColumnParallelLinear):
    """A linear that ModelOpt does not quantize, as it knows classes by their ``forward``."""

    def forward(self, *arguments: Any, **options: Any) -> Any:
        return super().forward(*arguments, **options)


class Convolution(torch.nn.Module):
    """The kernels of a convolution over the last tokens, one a channel: [channels, 1, width]."""

    def __init__(self, channels: int, width: int, dtype: torch.dtype, device: Any) -> None:
        super().__init__()
        weight = torch.empty(channels, 1, width, dtype=dtype, device=device)
        self.weight = torch.nn.Parameter(weight)
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[b, channels, width - 1 + s] to [b, channels, s]."""
        return functional.silu(functional.conv1d(inputs, self.weight, groups=inputs.shape[1]))


class GatedNorm(torch.nn.Module):
    """RMSNorm of each head, times the gate; the weight is the factor, not the factor less one."""

    def __init__(self, config: Any, hidden_size: int, eps: float) -> None:
        super().__init__()
        device = torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.empty(hidden_size, device=device))
        vars(self.weight)["sequence_parallel"] = config.sequence_parallel
        self.eps = eps

    def forward(self, inputs: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """Rounded where transformers rounds; ``gate`` has the shape of ``inputs``."""
        normalized = functional.rms_norm(inputs.float(), (inputs.shape[-1],), None, self.eps)
        weighed = self.weight.to(inputs.dtype) * normalized.to(inputs.dtype)
        return (weighed * functional.silu(gate.float())).to(inputs.dtype)


class CachingGatedDeltaNet(GatedDeltaNet):
    """Queries, keys, values and gates in ``in_proj``; beta and alpha in ``in_proj_ba``.

    Decays, biases of steps and the norm are float32, as in published files.
    """

    def __init__(self, config: Any, *arguments: Any, **options: Any) -> None:
        super().__init__(config, *arguments, **options)
        device = torch.cuda.current_device()
        self.in_proj_ba = PlainLinear(
            self.hidden_size,
            2 * self.num_value_heads,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_group=self.pg_collection.tp,
        )
        self.conv1d: Any = Convolution(
            self.conv_dim_local_tp, self.conv_kernel_dim, config.params_dtype, device
        )
        for name in ("A_log", "dt_bias"):
            of_heads = torch.empty(self.num_v_heads_local_tp, device=device)
            setattr(self, name, torch.nn.Parameter(of_heads))
            set_tensor_model_parallel_attributes(getattr(self, name), True, 0, 1)

    def _setup_variant_attrs(self) -> None:
        self.in_proj_extra_dim = 0
        self.dt_bias_dim = self.a_log_dim = self.num_v_heads_local_tp
        self.in_proj_split_names = ["query", "key", "value", "z"]
        sizes = [self.qk_dim_local_tp] * 2 + [self.v_dim_local_tp] * 2
        self.in_proj_split_sections = self.feat_dim_split = tuple(sizes)
        self.gated_delta_rule = common.chunk_gated_delta_rule

    def reset_parameters(self) -> None:
        """Weights are loaded."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: Any = None,
        inference_context: Any = None,
        packed_seq_params: Any = None,
        **_options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Hidden states [s, b, hidden] to the layer's output and no bias."""
        if packed_seq_params is not None or self.cp_size > 1:
            raise NotImplementedError("packed sequences and CP > 1 of gated delta nets")
        projected, numbers = (
            linear(hidden_states)[0].transpose(0, 1) for linear in (self.in_proj, self.in_proj_ba)
        )
        mixed, gate = projected.split([self.conv_dim_local_tp, self.v_dim_local_tp], dim=-1)
        beta, alpha = numbers.chunk(2, dim=-1)
        before = self._states(inference_context, projected)
        convolved = torch.cat([before.convolution, mixed.mT], dim=-1)
        query, key, value = self._heads(self.conv1d(convolved).mT)
        step = functional.softplus(alpha.float() + self.dt_bias)
        output, after = self.gated_delta_rule(
            query,
            key,
            value,
            g=-self.A_log.exp() * step,
            beta=beta.sigmoid(),
            initial_state=before.recurrence,
            output_final_state=inference_context is not None,
            use_qk_l2norm_in_kernel=True,
        )
        if inference_context is not None and after is not None:
            last = convolved[..., convolved.shape[-1] - before.convolution.shape[-1] :]
            states = RecurrentStates(last, after)
            inference_context.key_value_memory_dict[self.layer_number] = states
        normalized = self.out_norm(output, gate.reshape(output.shape)).flatten(-2)
        found: tuple[torch.Tensor, torch.Tensor | None]
        found = self.out_proj(normalized.transpose(0, 1).contiguous())
        return found

    def _states(self, context: Any, like: torch.Tensor) -> RecurrentStates:
        """Of the tokens before these; zeros before the first."""
        if context is not None and context.sequence_len_offset > 0:
            found: RecurrentStates = context.key_value_memory_dict[self.layer_number]
            return found
        batch, heads = len(like), self.num_v_heads_local_tp
        sizes = heads, self.key_head_dim, self.value_head_dim
        return RecurrentStates(
            like.new_zeros(batch, self.conv_dim_local_tp, self.conv_kernel_dim - 1),
            like.new_zeros(batch, *sizes, dtype=torch.float32),
        )

    def _heads(self, mixed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values [b, s, value heads, size of a head] of [b, s, channels]."""
        query, key, value = mixed.split(
            [self.qk_dim_local_tp, self.qk_dim_local_tp, self.v_dim_local_tp], dim=-1
        )
        repeats = self.num_value_heads // self.num_key_heads
        query, key = (
            each.unflatten(-1, (-1, self.key_head_dim)).repeat_interleave(repeats, dim=2)
            for each in (query, key)
        )
        return query, key, value.unflatten(-1, (-1, self.value_head_dim))

    def sharded_state_dict(self, prefix: str = "", *arguments: Any, **options: Any) -> Any:
        """Each part of a linear is divided over ranks."""
        found = super().sharded_state_dict(prefix, *arguments, **options)
        key, parts = f"{prefix}in_proj_ba.weight", self.row_parts("in_proj_ba")
        found[key] = _split_tensor_factory(found[key], list(parts.values()), list(parts), 0)
        return found

    def row_parts(self, linear: str) -> dict[str, int]:
        """This rank's rows of each part of a linear, which ranks divide part by part."""
        if linear == "in_proj":
            return dict(zip(self.in_proj_split_names, self.in_proj_split_sections, strict=True))
        heads: int = self.num_v_heads_local_tp
        return {"beta": heads, "alpha": heads}


def replace_attention(block: Any, config: Any, layers: Sequence[int]) -> None:
    """Change the layer specs of ``block``, this stage's, where the model's ``layers`` have a 1."""
    logger.info("gated delta nets run %s", delta_rule.where(common.chunk_gated_delta_rule))
    offset = get_transformer_layer_offset(config)
    for number, layer in enumerate(block.layer_specs):
        if layers[offset + number]:
            block.layer_specs[number] = _with_delta_net(layer)


def _with_delta_net(layer: ModuleSpec) -> ModuleSpec:
    layer, submodules = copy.copy(layer), copy.copy(layer.submodules)
    layer.submodules = submodules
    submodules.self_attention = ModuleSpec(
        module=CachingGatedDeltaNet,
        submodules=GatedDeltaNetSubmodules(
            in_proj=ColumnParallelLinear, out_norm=GatedNorm, out_proj=RowParallelLinear
        ),
    )
    keys = submodules.sharded_state_dict_keys_map
    submodules.sharded_state_dict_keys_map = {
        name: _FUSED_NORM if name == _NORM else other for name, other in keys.items()
    }
    return layer
