"""What an EAGLE-3 draft is trained for: the :class:`~post_training.training.Task` of eagle3.py.

The target runs without gradients over all pipeline stages; the states of its auxiliary layers
travel along with the hidden states. On the last stage the draft takes ``ttt_steps`` steps of
training-time test, each reading the states of the one before, and is compared with the target's
distribution at every answer token.

Rows and tokens. Row ``t`` of the draft reads the embedding of token ``t + 1`` and the states of
token ``t`` and proposes token ``t + 2``; its teacher is what the target says after token ``t + 1``.
At step ``k`` the first ``k`` rows have no predecessor and do not count. Answer-only training: a row
counts if token ``t + 2`` belongs to an answer.

With sequence parallelism target and draft compute on a part of the rows on each tensor-parallel
rank; the loss, and the shift of rows from one step to the next, need whole sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from megatron.core import parallel_state, tensor_parallel
from megatron.core.pipeline_parallel import get_forward_backward_func

from post_training.drafts.eagle3 import attention as draft_attention
from post_training.drafts.eagle3 import loss as draft_loss
from post_training.drafts.eagle3.draft import Draft
from post_training.inference import forward
from post_training.training.task import Loss, LossFunction, Task


def task(core: Any, draft: Draft) -> Task:
    """The task of training ``core``'s draft."""
    if core.post_process:
        # The layers that make logits take whole sequences, which the loss reads in chunks.
        for layer in (core.output_layer, getattr(core.eagle_module, "eagle_output_layer", None)):
            if layer is not None:
                layer.sequence_parallel = False
    steps = range(1, draft.ttt_steps + 1)
    names = (*(f"loss_{k}" for k in steps), *(f"accuracy_{k}" for k in steps))
    return Task(
        forward_step=forward_step,
        metric_names=names,
        set_mode=set_mode,
        adjust_tensor_shapes=_pipeline_shapes(core),
    )


def set_mode(model: Any) -> None:
    """The target as in inference, the draft as in training.

    A router of experts updates its balance in training mode.
    """
    core = forward.unwrap(model)
    core.eval()
    if core.eagle_module is not None:
        core.eagle_module.train()


def forward_step(model: Any, batch: Mapping[str, Any]) -> tuple[torch.Tensor, LossFunction]:
    """One micro batch through this pipeline stage.

    Args:
        model: of this rank, in megatron-core's DDP or not.
        batch: ``input_ids`` int64 [b, s], ``loss_mask`` [b, s] (1 where a token is an answer's);
            offline also ``hidden_states`` [b, s, h] and ``aux_hidden_states`` [b, s, n h].
    """
    core = forward.unwrap(model)
    if "hidden_states" in batch:
        hidden, auxiliary = (
            _own_rows(core, batch[name].transpose(0, 1).contiguous())
            for name in ("hidden_states", "aux_hidden_states")
        )
        anchor = None
    else:
        hidden, auxiliary, anchor = run_target(core, batch["input_ids"])
    if not core.post_process:
        output = torch.cat([hidden, auxiliary], dim=-1)
        return (output if anchor is None else output + anchor), _no_loss
    total, count, metrics = _losses(core, batch, hidden, auxiliary)
    if anchor is not None:
        total = total + anchor
    return total, lambda output: (output, count, metrics)


def run_target(
    core: Any, input_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The target on this stage, without gradients: hidden states [s, b, h], those of the auxiliary
    layers up to here [s, b, n h], and what the stage's output must be added to. With sequence
    parallelism this rank's part of the rows.

    Stages exchange gradients of what they receive. Nothing before the draft is trained, so the
    gradient is zero; the schedule still waits for one, and gets it through the third value.
    """
    size = core.config.hidden_size
    received, anchor = None, None
    if not core.pre_process:
        received = core.decoder.input_tensor
        if torch.is_grad_enabled() and received.requires_grad:
            anchor = 0.0 * received.sum()
        received = received.detach()
        core.decoder.set_input_tensor(received[..., :size].contiguous())
    positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    with torch.no_grad(), forward.auxiliary_states(core) as states:
        hidden, _ = core._base_model_forward(input_ids, positions, None)
    if received is not None:
        states.insert(0, received[..., size:])
    auxiliary = torch.cat(states, dim=-1) if states else hidden[..., :0]
    return hidden, auxiliary, anchor


@torch.no_grad()
def features(model: Any, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Hidden states [s, b, h] and those of the auxiliary layers [s, b, n h], on the last stage.

    What online training computes and offline training reads; None on earlier pipeline stages.
    """
    core = forward.unwrap(model)
    found: list[tuple[torch.Tensor, torch.Tensor]] = []

    def step(iterator: Any, _model: Any) -> tuple[torch.Tensor, Any]:
        hidden, auxiliary, _ = run_target(core, next(iterator))
        if core.post_process:
            found.append((hidden, auxiliary))
            return hidden.new_zeros(()), lambda output: (output, None)
        return torch.cat([hidden, auxiliary], dim=-1), _no_loss

    pipeline = core.config.pipeline_model_parallel_size > 1
    with forward.whole_sequences(core):
        get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iter([input_ids]),
            model=[core],
            num_microbatches=1,
            seq_length=input_ids.shape[1],
            micro_batch_size=input_ids.shape[0],
            forward_only=True,
            **({"adjust_tensor_shapes_fn": _pipeline_shapes(core)} if pipeline else {}),
        )
    return found[0] if found else None


def _losses(
    core: Any, batch: Mapping[str, Any], hidden: torch.Tensor, auxiliary: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Weighted sum of the losses, number of tokens, and [sum, count] of each metric."""
    draft, input_ids = core.eagle_module, batch["input_ids"]
    size, length = input_ids.shape
    rows = length - 1
    # Row t: token t + 1 is read, token t + 2 is proposed; the last two rows propose nothing known.
    following = F.pad(input_ids[:, 1:], (0, 1))
    weight = F.pad(batch["loss_mask"][:, 2:], (0, 2)).T.float()[:rows]
    positions = torch.arange(length, device=input_ids.device).expand_as(input_ids)
    with torch.no_grad():
        embeddings = core.embedding(input_ids=following, position_ids=positions)
    # megatron-core keeps the table; made by an evaluation, it could not be differentiated through.
    rotary = draft.rotary_pos_emb(length).clone()
    head = getattr(draft, "eagle_output_layer", None)
    student = _target_output(core) if head is None else lambda states: head(states)[0]
    trained = [] if head is None else list(head.parameters())
    # Columns of a rank's logits, the larger of target's and draft's.
    columns = core.vocab_size // parallel_state.get_tensor_model_parallel_world_size()
    spans = draft_loss.chunks(rows, size, columns)
    teacher = draft_loss.Teacher(_teacher_logits(core, _all_rows(core, hidden)), rows)
    states = draft.fc(auxiliary)[0]
    total = hidden.new_zeros((), dtype=torch.float32)
    metrics = {}
    mixed = core.eagle_mix_hidden_states
    with draft_attention.over_steps(draft, independent=mixed):
        for step in range(core.eagle_ttt_steps):
            output, made = draft(embeddings, states, None, rotary_pos_emb=rotary)
            counted = weight.clone()
            counted[:step] = 0.0
            loss, right = draft_loss.WeightedLoss.apply(
                student, teacher, counted, spans, _all_rows(core, output)[:rows], *trained
            )
            count = counted.sum()
            total = total + core.eagle_loss_decay_factor**step * loss
            metrics[f"loss_{step + 1}"] = torch.stack([loss.detach(), count])
            metrics[f"accuracy_{step + 1}"] = torch.stack([right, count])
            # Row t reads what row t - 1 made.
            made = _own_rows(core, F.pad(_all_rows(core, made)[:-1], (0, 0, 0, 0, 1, 0)))
            states = _mix(core, states, made, step) if mixed else made
    return total, weight.sum(), metrics


def _mix(core: Any, states: torch.Tensor, made: torch.Tensor, step: int) -> torch.Tensor:
    """Replace a random part of the rows by what the draft made of them: half, a third, a fifth, ...

    As ModelOpt's ``eagle_mix_hidden_states``. Drawn on the CPU, so that every device and every
    tensor-parallel rank chooses alike.
    """
    length, batch, _ = states.shape
    if core.config.sequence_parallel:
        length *= core.config.tensor_model_parallel_size
    count = max(1, length // (2**step + 1))
    chosen = torch.zeros(length, batch, dtype=torch.bool)
    for i in range(batch):
        chosen[torch.randperm(length)[:count], i] = True
    return torch.where(_own_rows(core, chosen.to(states.device).unsqueeze(-1)), made, states)


def _all_rows(core: Any, states: torch.Tensor) -> torch.Tensor:
    """Of the whole sequence, [s, b, h]. Ranks must use them alike; each gets its own gradient."""
    if core.config.sequence_parallel:
        gather = tensor_parallel.gather_from_sequence_parallel_region
        states = gather(states, tensor_parallel_output_grad=False)
    return states


def _own_rows(core: Any, states: torch.Tensor) -> torch.Tensor:
    """This rank's rows of the whole sequence: [s, b, h] to [s / TP, b, h]."""
    if core.config.sequence_parallel:
        states = tensor_parallel.scatter_to_sequence_parallel_region(states)
    return states


def _target_output(core: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """From states to this rank's part of the target's logits."""
    weight = None
    if core.share_embeddings_and_output_weights:
        weight = core.shared_embedding_or_output_weight()
    return lambda states: core.output_layer(states, weight=weight)[0]


def _teacher_logits(core: Any, hidden: torch.Tensor) -> Callable[[int, int], torch.Tensor]:
    """The target's logits that rows of the draft are compared with, in the draft's vocabulary."""
    output = _target_output(core)
    d2t = getattr(core.eagle_module, "d2t", None)

    def logits(start: int, stop: int) -> torch.Tensor:
        found = output(hidden[start + 1 : stop + 1])
        if d2t is None:
            return found
        whole = tensor_parallel.gather_from_tensor_model_parallel_region(found)
        tokens = torch.arange(len(d2t), device=d2t.device) + d2t
        part = tokens.chunk(parallel_state.get_tensor_model_parallel_world_size())
        return whole[..., part[parallel_state.get_tensor_model_parallel_rank()]]

    return logits


def _pipeline_shapes(core: Any) -> Callable[..., Any]:
    """Hidden states of the auxiliary layers below a stage's edge travel along with its input."""
    ids = core.eagle_config.eagle_aux_hidden_state_layer_ids
    layers = [layer.layer_number - 1 for layer in core.decoder.layers]

    def widened(shapes: list[Any], states: int) -> list[Any]:
        return [(*shape[:-1], shape[-1] * (1 + states)) for shape in shapes]

    def adjust(received: list[Any], sent: list[Any]) -> tuple[list[Any], list[Any]]:
        below = sum(i < min(layers) for i in ids)
        above = sum(i <= max(layers) for i in ids)
        return widened(received, below), widened(sent, above)

    return adjust


def _no_loss(_output: torch.Tensor) -> Loss:
    raise RuntimeError("only the last pipeline stage has a loss")
