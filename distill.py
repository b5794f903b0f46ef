"""Distill a model into a smaller or quantized form of it: the student learns the teacher's output.

Inputs:  --load, the student, a Megatron checkpoint (prune.sh or quantize.sh made it); --teacher,
         the model before that; --finetune-hf-dataset or --finetune-data-files, text or
         conversations; --export-kd-cfg, what is compared (post_training/distillation/options.py).
Outputs: --save, a checkpoint of the student for each --save-interval, with run.json; in its folder
         training/ metrics.jsonl, curves.png and TensorBoard files.

The same command resumes a run that was interrupted. Ended by SIGTERM, SIGUSR1 or a limit, it saves
and exits with code 75.

    TEACHER_CKPT=/work/Qwen3-8B_mlm MLM_MODEL_CKPT=/work/Qwen3-8B_pruned \\
        bash distill.sh Qwen/Qwen3-8B --finetune-data-files /data/text.jsonl
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from post_training.checkpoints import loading, torch_dist
from post_training.checkpoints.source import Source, fetch_source, size_estimate
from post_training.cli.stage import Stage, run
from post_training.common import outputs
from post_training.config.flags import flag, group
from post_training.config.options import StageOptions
from post_training.data import conversation_data, text_data
from post_training.data.options import TrainingTextOptions
from post_training.data.sources import TextSource
from post_training.distillation import options as distillation_options
from post_training.distillation.options import DistillationOptions, DistillConfig
from post_training.models.builder import count_parameters
from post_training.training import options as training_options
from post_training.training import run as training_run
from post_training.training.options import TrainingFlags
from post_training.training.run import Run, TrainingPlan, exit_if_asked

if TYPE_CHECKING:
    from post_training.distributed.session import Session
    from post_training.training.trainer import TrainingResult

SEQUENCE_LENGTH = 2048


@dataclass(frozen=True, kw_only=True)
class DistillOptions(StageOptions):
    # ModelOpt's examples distill pruned models with these; eagle3's differ.
    DEFAULTS: ClassVar[Mapping[str, Any]] = {
        "finetune_hf_dataset": "cnn_dailymail",
        "train_iters": 1000,
        "lr": 1e-4,
        "min_lr": 1e-5,
        "weight_decay": 0.1,
        "save_interval": 500,
        "eval_interval": 100,
        "log_interval": 10,
    }

    answers_only: bool = flag(
        False, help="of conversations, learn what the teacher says in the answers only"
    )
    distillation: DistillationOptions = group(DistillationOptions)
    text: TrainingTextOptions = group(TrainingTextOptions)
    training: TrainingFlags = group(TrainingFlags)


@dataclass(frozen=True)
class Plan(TrainingPlan):
    """``start`` has the student; ``of_teacher`` are the options with the teacher as the model."""

    options: DistillOptions
    of_teacher: DistillOptions
    teacher: Source
    config: DistillConfig
    text: TextSource


def check(options: DistillOptions) -> Plan:
    training = training_options.decide(
        options.training, options, options.seq_length or SEQUENCE_LENGTH
    )
    config = distillation_options.read(options.distillation.export_kd_cfg)
    of_teacher, teacher = distillation_options.find_teacher(
        options, options.distillation.export_kd_teacher_load
    )
    options = distillation_options.noting(options, options.distillation, teacher)
    start = training_run.find_start(options)
    distillation_options.check_pair(config, start.source, teacher, options.parallel.pipeline)
    training_run.require_trainable(start.source)
    for source in (start.source, teacher):
        training_run.check_model(source, options, training.seq_length)
    text = options.text.source(options.given)
    (conversation_data if options.answers_only else text_data).check(text)
    needed = 2 * size_estimate(start.source, options, optimizer=True)  # one is being written
    outputs.disk_space(start.folder, needed)
    return Plan(options, start, training, of_teacher, teacher, config, text)


def distill(plan: Plan, session: Session) -> TrainingResult:
    """Train to the end, or to an interruption.

    Raises:
        UsageError: for data or layers that cannot be trained on.
    """
    from post_training.distillation import conversion

    options, config = plan.options, plan.config
    this = Run.open(plan, session)
    teacher_source = fetch_source(plan.teacher, plan.of_teacher)
    prepare = conversation_data.prepare if options.answers_only else text_data.prepare
    parts, content = this.data(prepare, plan.text)
    exit_if_asked(session)
    split = options.sequence_parallel
    student = loading.load(this.source, options, session, sequence_parallel=split)
    parameters = count_parameters(student)
    teacher = loading.load(teacher_source, plan.of_teacher, session, sequence_parallel=split)
    metrics = {
        "parameters": parameters,
        "teacher_parameters": count_parameters(teacher),
        "distillation": asdict(config),
    }
    exit_if_asked(session)
    model = conversion.attach(student, teacher, config, options.seed)
    if plan.start.resumes:
        torch_dist.load(model, plan.start.folder, only=conversion.LOSS_MODULES)
    inputs = [*teacher_source.inputs("teacher"), *content["read"]]
    task = conversion.task(model, config, plan.training)
    return this.train(
        model, task, parts, inputs, lambda iteration: ({**metrics, "iteration": iteration}, {})
    )


def show(plan: Plan, result: TrainingResult, session: Session) -> None:
    found = result.metrics
    losses = {
        "distillation loss": ("loss", "eval_loss"),
        "of the logits": ("logits", "eval_logits"),
        "of intermediate layers": ("intermediate", "eval_intermediate"),
        "cross entropy": ("cross_entropy", "eval_cross_entropy"),
    }
    rows = {
        text: ", held out ".join(f"{found[name]:.4f}" for name in names if name in found)
        for text, names in losses.items()
        if names[0] in found
    }
    next_step = (
        f"MLM_MODEL_CKPT={plan.start.folder} bash mmlu.sh <conf>, then bash export.sh <conf>"
    )
    training_run.show(plan, result, "distilled", rows, next_step)


STAGE = Stage(
    "distill",
    DistillOptions,
    check,
    distill,
    show,
    exit_code=training_run.exit_code,
    outputs=("save",),
    saves_on_signal=True,
    sequence_parallel=True,
)


def main() -> None:
    run(STAGE)


if __name__ == "__main__":
    main()
