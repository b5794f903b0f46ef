"""Knowledge distillation by ModelOpt: the student becomes a model that holds its teacher.

:func:`attach` converts it (``kd_loss`` mode, with the adjustments for megatron-core that ModelOpt's
plugin makes) and :func:`task` is what the training loop trains. The teacher runs without gradients,
stage by stage beside the student; its hidden states travel in the same tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import modelopt.torch.distill as mtd
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from megatron.core.transformer import MegatronModule
from modelopt.torch.distill.plugins import megatron as plugin

from post_training.common.errors import UsageError, suggest
from post_training.common.quiet import quiet
from post_training.distillation.options import OPTION, DistillConfig
from post_training.distributed import collectives
from post_training.inference import forward
from post_training.training import next_token
from post_training.training.options import TrainingOptions
from post_training.training.task import Loss, LossFunction, Task

# Where ModelOpt keeps losses that have weights: the projection from the student's hidden size to
# the teacher's. They are trained and saved with a run, and are no part of the student.
LOSS_MODULES = "_loss_modules."


def attach(
    student: MegatronModule, teacher: MegatronModule, config: DistillConfig, seed: int
) -> MegatronModule:
    """``student``, in place, with its teacher and losses; a collective call.

    Both are this rank's part, split in the same way. ``seed`` is of the projection between hidden
    sizes.

    Raises:
        UsageError: on every rank, if a layer that the configuration names is not there.
    """
    settings = plugin.DistillationConfig(**vars(config))

    def not_connected(reason: str) -> UsageError:
        return UsageError(
            f"{OPTION}: intermediate_layer_pairs or logit_layers",
            reason,
            "name modules of the model on the last pipeline stage",
        )

    with collectives.fail_together((ValueError, AttributeError), not_connected):
        # Every tensor-parallel rank draws the same projection.
        torch.manual_seed(seed)
        # ModelOpt warns of what is known: default settings, and full hidden states under TP.
        with quiet("modelopt.torch.distill.plugins.megatron"):
            plugin.setup_distillation_config(settings, student.config, teacher.config)
        criterion = settings.criterion or {}
        for student_layer, teacher_layer in criterion:
            _require_layer(student, student_layer, "student")
            _require_layer(teacher, teacher_layer, "teacher")
    like = next(student.parameters())
    for loss in criterion.values():
        loss.to(device=like.device, dtype=like.dtype)
    _correct_gradients(criterion.values())
    mode = {
        "teacher_model": teacher,
        "criterion": settings.criterion,
        "loss_balancer": settings.loss_balancer,
    }
    model = mtd.convert(student, mode=[("kd_loss", mode)])
    plugin.adjust_distillation_model_for_mcore(model, settings)
    model.compute_language_model_loss = partial(_cross_entropy, model.compute_language_model_loss)
    return model


def _cross_entropy(compute: Any, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """The student's cross entropy, from a copy of float32 logits.

    megatron-core computes it in place (tensor_parallel/cross_entropy.py), and the distillation loss
    reads the same logits afterwards. In 16 bits it makes a copy itself.
    """
    return compute(labels, logits.clone() if logits.dtype.itemsize == 4 else logits)


def _require_layer(model: torch.nn.Module, name: str, whose: str) -> None:
    try:
        model.get_submodule(name)
    except AttributeError:
        known = [each for each, _ in model.named_modules() if each.count(".") <= 3]
        hint = suggest(name, known)
        raise AttributeError(f"the {whose} has no {name}. {hint}".strip()) from None


def _correct_gradients(losses: Iterable[torch.nn.Module]) -> None:
    """Make the gradient of the top-k loss that of one rank where logits are split over several.

    Each rank computes the whole loss from gathered logits, and the gathering's backward pass adds
    the ranks' gradients up (TopKLogitsKLLoss in modelopt/torch/distill/plugins/megatron.py).
    """
    ranks = parallel_state.get_tensor_model_parallel_world_size()

    def divide(_module: torch.nn.Module, _inputs: Any, output: tuple[Any, ...]) -> None:
        if output[0].requires_grad:
            output[0].register_hook(lambda gradient: gradient / ranks)

    for loss in losses:
        if ranks > 1 and isinstance(loss, plugin.TopKLogitsKLLoss):
            loss.register_forward_hook(divide)


def task(model: Any, config: DistillConfig, options: TrainingOptions) -> Task:
    """The task of training ``model``, which :func:`attach` made."""
    names = ["logits"]
    if config.intermediate_layer_pairs:
        names.append("intermediate")
    if not config.skip_lm_loss:
        names.append("cross_entropy")
    adjust = plugin.get_tensor_shapes_adjust_fn_for_distillation(
        model,
        seq_length=options.seq_length,
        micro_batch_size=options.micro_batch_size,
        decoder_seq_length=None,
    )
    return Task(
        forward_step=_forward_step,
        metric_names=tuple(names),
        set_mode=lambda model: model.train(),
        adjust_tensor_shapes=adjust,
    )


def _forward_step(model: Any, batch: Mapping[str, Any]) -> tuple[torch.Tensor, LossFunction]:
    """One micro batch through this pipeline stage, teacher and student.

    Args:
        model: of this rank, in megatron-core's DDP or not.
        batch: ``input_ids`` int64 [b, s], ``loss_mask`` [b, s] (1 where a token counts).
    """
    core = forward.unwrap(model)
    positions, labels, weight = next_token.targets(batch)
    output = model(batch["input_ids"], positions, None, labels=labels)

    def loss(output: torch.Tensor) -> Loss:
        count = weight.sum()
        own = (output.float() * weight).sum()
        found = core.compute_kd_loss(
            student_loss=own, loss_reduction_fn=partial(_weighted_sum, weight=weight)
        )
        values = {
            "logits": found["logits_loss"],
            "intermediate": found["intermediate_loss"],
            "cross_entropy": own,
        }
        metrics = {
            name: torch.stack([value.detach().float(), count]) for name, value in values.items()
        }
        return found["kd_loss"], count, metrics

    return output, loss


def _weighted_sum(found: tuple[torch.Tensor, bool, bool], weight: torch.Tensor) -> torch.Tensor:
    """The sum of a loss over the tokens that count.

    Args:
        found: the loss [b, s]; whether each tensor-parallel rank has the part of its own logits
            only; whether it has the part of its own tokens only, [b, s / TP]. Parts are added up,
            and each rank's gradient is that of its part.
        weight: [b, s].
    """
    losses, is_partial, is_sequence_parallel = found
    if is_sequence_parallel:
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        weight = weight.chunk(ranks, dim=1)[parallel_state.get_tensor_model_parallel_rank()]
    total = (losses * weight).sum()
    if is_partial or is_sequence_parallel:
        return reduce_from_tensor_model_parallel_region(total)
    return total
