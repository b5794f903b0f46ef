"""One forward pass of a megatron-core model over tensor and pipeline parallelism, for inference.

Internals of :mod:`post_training.inference.generation` and of speculative decoding: the exchange
between pipeline stages and the two hooks that keep a pass small, on the output layer and on
attention after a cached prefix.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.hooks import RemovableHandle

from post_training.common.errors import UsageError
from post_training.models.recurrent_states import RecurrentStates

if TYPE_CHECKING:
    from megatron.core.inference.contexts import StaticInferenceContext


def run(
    core: Any,
    input_ids: torch.Tensor,
    positions: torch.Tensor | None,
    context: StaticInferenceContext | None = None,
    features: list[torch.Tensor] | None = None,
    labels: torch.Tensor | None = None,
    hidden: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Run this rank's stage. Logits on the last one, None on the others.

    A draft that is attached to the model takes no part.

    Args:
        core: the model.
        input_ids: int64 [b, s].
        positions: int64 [b] or [b, k]; logits of these positions of each sequence only,
            [b, 1 or k, vocabulary]. None: of all, [b, s, vocabulary].
        context: cache holding ``sequence_len_offset`` tokens already; advanced by s.
        features: on the last stage the hidden states that an attached draft is fed with are
            appended, one tensor [s, b, hidden] for each of its auxiliary layers, in order.
        labels: int64 [b, s]; the result is then the cross entropy of each, float32 [b, s].
        hidden: what the first layer is given in place of the embedded ids, [s, b, hidden].

    Raises:
        UsageError: if the result is not finite; on the last stage alone, which ends the others.
    """
    from megatron.core import parallel_state
    from megatron.core.inference.utils import InferenceMode
    from megatron.core.models.gpt import GPTModel

    if core.config.sequence_parallel or core.config.context_parallel_size > 1:
        raise ValueError(
            "inference needs a model built with sequence_parallel=False and context_parallel_size=1"
        )
    if core.training:
        core.eval()
    batch, length = input_ids.shape
    offset = 0 if context is None else int(context.sequence_len_offset)
    position_ids = torch.arange(offset, offset + length, device=input_ids.device)
    group = parallel_state.get_pipeline_model_parallel_group()
    dtype = dtype_of(core)
    collected: list[torch.Tensor] = []
    if not core.pre_process:
        width = core.config.hidden_size
        parts = 1 if features is None else 1 + _earlier_features(core)
        received = torch.empty(length, batch, parts * width, dtype=dtype, device=input_ids.device)
        previous = parallel_state.get_pipeline_model_parallel_prev_rank()
        torch.distributed.recv(received, src=previous, group=group)
        hidden, *collected = received.split(width, dim=-1)
        core.set_input_tensor(hidden.contiguous())
    mask = None
    with contextlib.ExitStack() as stack:
        auxiliary = stack.enter_context(auxiliary_states(core))
        if labels is None:
            # In this mode logits are always whole; the cross entropy takes them split.
            stack.enter_context(InferenceMode.active())
        if core.post_process and positions is not None:
            stack.enter_context(_output_at(core, positions))
        if offset and length > 1:
            mask = causal_mask(offset, length, input_ids.device)
            stack.enter_context(attention_mask_type(core.decoder.layers, "arbitrary"))
        # The class that ModelOpt's ``eagle`` mode gives a drafted model computes training losses.
        drafted = hasattr(core, "eagle_ttt_steps")
        target = partial(GPTModel.forward, core) if drafted else core
        output = target(
            input_ids,
            position_ids.expand(batch, -1),
            mask,
            decoder_input=hidden,
            labels=labels,
            inference_context=context,
            runtime_gather_output=labels is None,
        )
    if features is not None:
        collected += auxiliary
    if context is not None:
        context.sequence_len_offset += length
        context.enable_decode_mode()
    if core.post_process:
        if features is not None:
            features += collected
        _require_finite(output)
        return output
    if features is not None:
        output = torch.cat([output, *collected], dim=-1)
    following = parallel_state.get_pipeline_model_parallel_next_rank()
    torch.distributed.send(output.to(dtype).contiguous(), dst=following, group=group)
    return None


def _require_finite(output: torch.Tensor) -> None:
    """Of NaN logits argmax takes the first: a broken model would seem to decide."""
    # NaN and Inf survive a sum, which needs no further memory.
    if not output.sum(dtype=torch.float32).isfinite():
        raise UsageError(
            "the model's logits",
            "they are not finite, though its weights are: values overflow in this precision",
            "give --bf16 or --fp32; if it is in one of them already, compare the conf with the "
            "model's config.json",
        )


@contextlib.contextmanager
def auxiliary_states(core: Any) -> Iterator[list[torch.Tensor]]:
    """After the context the list has the outputs [s, b, h] of this stage's auxiliary layers.

    A drafted model's layers leave them in ``core._aux_hidden_states`` (hooks of ModelOpt's
    ``eagle`` mode), which is empty before and after. Without a draft the list stays empty.
    """
    found: list[torch.Tensor] = []
    kept = getattr(core, "_aux_hidden_states", [])
    kept.clear()
    try:
        yield found
        found += kept
    finally:
        kept.clear()


@contextlib.contextmanager
def whole_sequences(core: Any) -> Iterator[None]:
    """Sequence parallelism, which is for training, is off in the context.

    As megatron-core's ``set_model_to_sequence_parallel`` (transformer/utils.py), but for every
    configuration in the model, of which a draft has its own.
    """
    names = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")
    with contextlib.ExitStack() as stack:
        for module in core.modules():
            for owner in (module, getattr(module, "config", None)):
                for name in names:
                    if getattr(owner, name, False) is True:
                        setattr(owner, name, False)
                        stack.callback(setattr, owner, name, True)
        yield


def _earlier_features(core: Any) -> int:
    """Number of auxiliary layers on the stages before this one."""
    first = core.decoder.layers[0].layer_number - 1
    return sum(layer < first for layer in core.eagle_config.eagle_aux_hidden_state_layer_ids)


def _output_at(core: Any, positions: torch.Tensor) -> RemovableHandle:
    """Let the output layer see these positions of each sequence: hidden [s, b, h] -> [k, b, h]."""
    chosen = positions.reshape(len(positions), -1).T
    rows = torch.arange(len(positions), device=positions.device)

    def gather(_module: torch.nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *rest = arguments
        return (hidden[chosen, rows], *rest)

    return core.output_layer.register_forward_pre_hook(gather)


def causal_mask(offset: int, length: int, device: torch.device) -> torch.Tensor:
    """bool [1, 1, length, offset + length], True where attention is not allowed."""
    everywhere = torch.ones(1, 1, length, offset + length, dtype=torch.bool, device=device)
    return everywhere.triu(offset + 1)


@contextlib.contextmanager
def attention_mask_type(layers: Iterable[Any], name: str) -> Iterator[None]:
    """Let the attention of ``layers`` use this type of mask, one of megatron-core's AttnMaskType.

    megatron-core (transformer/attention.py) supposes one token after a filled static cache and
    turns masking off: several tokens need ``arbitrary`` and a mask.
    """
    from megatron.core.transformer.enums import AttnMaskType

    def change(
        _module: torch.nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return arguments, {**keywords, "attn_mask_type": AttnMaskType[name]}

    with contextlib.ExitStack() as stack:
        for layer in layers:
            attention = layer.self_attention.core_attention
            stack.enter_context(attention.register_forward_pre_hook(change, with_kwargs=True))
        yield


def new_context(batch: int, length: int) -> StaticInferenceContext:
    from megatron.core.inference.contexts import StaticInferenceContext

    context = StaticInferenceContext(batch, length)
    # The positions are chosen here (see _output_at), before this would cut to the last one.
    context.config.materialize_only_last_token_logits = False
    return context


def select(context: StaticInferenceContext, rows: torch.Tensor) -> None:
    """Keep these sequences of a cache: int64 [n], indices into its batch."""
    for layer, memory in context.key_value_memory_dict.items():
        # Keys and values begin with the positions, states of a recurrence with the sequences.
        if isinstance(memory, RecurrentStates):
            kept: tuple[torch.Tensor, ...] = RecurrentStates(*(each[rows] for each in memory))
        else:
            kept = tuple(each[:, rows] for each in memory)
        context.key_value_memory_dict[layer] = kept
    context.max_batch_size = len(rows)


def from_last_stage(
    tensor: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    """Give a tensor of the last pipeline stage to the others."""
    from megatron.core import parallel_state

    if tensor is None:
        tensor = torch.empty(shape, dtype=dtype, device=torch.cuda.current_device())
    group = parallel_state.get_pipeline_model_parallel_group()
    if group.size() > 1:
        tensor = tensor.contiguous()
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        torch.distributed.broadcast(tensor, src=last, group=group)
    return tensor


def device_of(core: torch.nn.Module) -> torch.device:
    return next(core.parameters()).device


def dtype_of(core: Any) -> torch.dtype:
    """Of the activations."""
    return core.config.pipeline_dtype or core.config.params_dtype


def unwrap(model: torch.nn.Module) -> Any:
    """The megatron-core model inside wrappers such as DistributedDataParallel."""
    while isinstance(inner := getattr(model, "module", None), torch.nn.Module):
        model = inner
    return model
