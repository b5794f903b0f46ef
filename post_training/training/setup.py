"""megatron-core's DDP, distributed optimizer and schedule of a training run."""

from __future__ import annotations

from typing import Any

from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer import MegatronModule

from post_training.training.options import TrainingOptions


def build(
    model: MegatronModule, options: TrainingOptions
) -> tuple[DistributedDataParallel, MegatronOptimizer, OptimizerParamScheduler]:
    """The model in DDP, its optimizer and schedule; its configuration learns of them.

    Gradients are summed in float32 and divided by the tokens of the whole iteration, over ranks and
    micro batches; the optimizer's state and the float32 weights are split over data parallelism.
    """
    config = model.config
    config.calculate_per_token_loss = True
    ddp = DistributedDataParallel(
        config=config,
        ddp_config=DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=True
        ),
        module=model,
    )
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=options.lr,
            min_lr=options.min_lr,
            weight_decay=options.weight_decay,
            adam_beta1=options.adam_beta1,
            adam_beta2=options.adam_beta2,
            adam_eps=options.adam_eps,
            clip_grad=options.clip_grad,
            bf16=options.dtype == "bf16",
            params_dtype=config.params_dtype,
            use_distributed_optimizer=True,
        ),
        [ddp],
    )
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        _correct_places(part)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=options.lr,
        min_lr=options.min_lr,
        lr_warmup_steps=options.lr_warmup_iters,
        lr_decay_steps=options.lr_decay_iters or options.train_iters,
        lr_decay_style=options.lr_decay_style,
        start_wd=options.weight_decay,
        end_wd=options.weight_decay,
        wd_incr_steps=options.train_iters,
        wd_incr_style="constant",
    )
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    config.no_sync_func = ddp.no_sync
    return ddp, optimizer, scheduler


def _correct_places(optimizer: Any) -> None:
    """Let each parameter be found where it is among its group's.

    megatron-core (distrib_optimizer.py) puts a group's float32 parameters first, which Mamba layers
    and gated delta nets have beside those in 16 bits, and looks parameters up in the order of its
    buffers: it would save one's state as another's, or fail where their sizes differ.
    """
    groups = zip(optimizer.model_fp32_groups, optimizer.model_float16_groups, strict=True)
    for index, (full, half) in enumerate(groups):
        for place, parameter in enumerate([*full, *half]):
            optimizer.model_param_group_index_map[parameter] = (index, place)
