"""Distill a model into a smaller or quantized form of it: the student learns the teacher's output.

Inputs:  --load, the student, a Megatron checkpoint (prune.sh or quantize.sh made it); --teacher,
         the model before that; --finetune-hf-dataset or --finetune-data-files, text or
         conversations; --export-kd-cfg, what is compared (distill_config.py).
Outputs: --save, a checkpoint of the student for each --save-interval, with run.json; in its folder
         training/ metrics.jsonl, curves.png and TensorBoard files.

Started again, the same command goes on where it was interrupted. Ended by SIGTERM, SIGUSR1 or a
limit, it saves and leaves with exit code 75.

    TEACHER_CKPT=/work/Qwen3-8B_mlm MLM_MODEL_CKPT=/work/Qwen3-8B_pruned \\
        bash distill.sh Qwen/Qwen3-8B --finetune-data-files /data/text.jsonl
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from post_training.checkpoints import loading
from post_training.checkpoints.source import fetch_source, find_source, size_estimate
from post_training.common import outputs
from post_training.common.errors import UsageError
from post_training.config import arguments, checks
from post_training.data import conversation_data, text_data
from post_training.distillation import options as distill_config
from post_training.distributed import signals
from post_training.models import parallel_check
from post_training.training import checkpoint as training_checkpoint
from post_training.training import options as training_options

if TYPE_CHECKING:
    from post_training.checkpoints.source import Source
    from post_training.distributed.session import Session
    from post_training.training.trainer import Outcome

logger = logging.getLogger("post_training")

DATASET = "cnn_dailymail"
# ModelOpt's examples distill pruned models with these; eagle3's differ.
DEFAULTS = {
    "train_iters": 1000,
    "lr": 1e-4,
    "min_lr": 1e-5,
    "weight_decay": 0.1,
    "save_interval": 500,
    "eval_interval": 100,
    "log_interval": 10,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("distill").add_argument
    distill_config.add_arguments(add)
    add(
        "--answers-only",
        action="store_true",
        help="of conversations, learn what the teacher says in the answers only",
    )
    conversation_data.add_arguments(parser, DATASET)
    training_options.add(parser, **DEFAULTS)


def check(args: argparse.Namespace) -> None:
    checks.required(args, "--save", "MLM_MODEL_SAVE")
    options = training_options.options(args)
    if args.context_parallel_size > 1:
        raise UsageError(
            f"CP={args.context_parallel_size}", "sequences are not divided here", "CP=1; raise DP"
        )
    config = distill_config.read(args.export_kd_cfg)
    teacher = distill_config.find_teacher(args)
    student = find_student(args)
    distill_config.check_pair(args, config, student, teacher)
    for source in (student, teacher):
        if source.described is not None:
            parallel_check.check(source.described, arguments.parallel(args))
            limit = source.described.max_position_embeddings
            if options.seq_length > limit:
                raise UsageError(
                    f"--seq-length {options.seq_length}",
                    f"the texts of {source.location} have at most {limit} tokens",
                    f"--seq-length {limit}",
                )
    (conversation_data if args.answers_only else text_data).check(conversation_data.source(args))
    needed = 2 * size_estimate(student, 8)  # weights and optimizer, twice
    outputs.disk_space(Path(args.save), needed)


def find_student(args: argparse.Namespace) -> Source:
    """The student: the run in --save, if there is one to go on with, else the given model."""
    folder = Path(args.save)
    goes_on = training_checkpoint.goes_on(folder, args.overwrite)
    training_checkpoint.check_folder(
        folder, "distill", args.overwrite and not goes_on, model=args.explicit.get("load")
    )
    if goes_on:
        args.load = args.save
    return find_source(args)


def distill(args: argparse.Namespace, session: Session) -> Outcome:
    """Train to the end, or to an interruption.

    Raises:
        UsageError: for data or layers that cannot be trained on.
    """
    from post_training.checkpoints import huggingface
    from post_training.common.manifest import Manifest, describe_input
    from post_training.distillation import conversion as distillation
    from post_training.models.builder import count_parameters
    from post_training.training.checkpoint import TrainingCheckpoints
    from post_training.training.setup import leave_if_asked
    from post_training.training.trainer import Trainer

    leave_if_asked(session)
    options = training_options.options(args)
    config = distill_config.read(args.export_kd_cfg)
    source = fetch_source(find_student(args), args)
    of_teacher = distill_config.teacher_arguments(args)
    teacher_source = fetch_source(distill_config.find_teacher(args), of_teacher)
    distill_config.check_pair(args, config, source, teacher_source)
    resume = training_checkpoint.goes_on(Path(args.save), args.overwrite)
    small_files = loading.local_huggingface(source, args)
    train, valid = samples(args, source, session)
    leave_if_asked(session)
    student = load(args, source, session)
    parameters = count_parameters(student)
    teacher = load(of_teacher, teacher_source, session)
    metrics: dict[str, Any] = {
        "parameters": parameters,
        "teacher_parameters": count_parameters(teacher),
        "distillation": config.to_json(),
    }
    leave_if_asked(session)
    model = distillation.attach(student, teacher, config, args.seed)
    inputs = [
        *source.inputs(),
        describe_input("teacher", teacher_source.location),
        {"role": "data", "path": conversation_data.source(args).describe()},
    ]
    if resume:
        distillation.load_projection(model, Path(args.save))
        # The run itself is where it goes on, not what it was made from.
        inputs = list((source.manifest or {})["inputs"])

    def record(iteration: int) -> Manifest:
        return Manifest(
            "distill",
            source.architecture.to_json(),
            configuration=arguments.explicit(args),
            inputs=inputs,
            metrics={**metrics, "iteration": iteration, **trainer.metrics},
            started=session.started,
            peak_memory_bytes=session.peak_memory(),
            extra={**source.carried(), "complete": iteration >= options.train_iters},
        )

    trainer = Trainer(
        model,
        distillation.task(model, config, options),
        options,
        session,
        TrainingCheckpoints(
            Path(args.save),
            record,
            lambda folder: huggingface.copy_small_files(
                small_files, folder, python_files=args.trust_remote_code
            ),
            options.keep_checkpoints,
        ),
        resume=resume,
    )
    return trainer.run(train, valid)


def load(args: argparse.Namespace, source: Source, session: Session) -> Any:
    """This rank's part of a model with its weights."""
    return loading.load(source, args, session)


def samples(args: argparse.Namespace, source: Source, session: Session) -> tuple[Any, Any]:
    """Data to train on and held-out data; a collective call."""
    options = training_options.options(args)
    prepare = conversation_data.prepare if args.answers_only else text_data.prepare
    parts, content = prepare(
        conversation_data.source(args),
        loading.tokenizer(source, args),
        options.seq_length,
        options.train_iters * options.global_batch_size,
        Path(args.save) / training_checkpoint.FOLDER / "data",
        session.show_progress,
    )
    logger.info("training data: %s", text_data.describe(content))
    return parts["train"], parts["valid"]


def show(args: argparse.Namespace, outcome: Outcome) -> None:
    """Print the summary."""
    from post_training.common import report

    found = outcome.metrics
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
    done, total = outcome.finished, training_options.options(args).train_iters
    report.summary(
        "distilled" if done else "interrupted, and saved",
        {
            "iterations": f"{outcome.iteration:,} of {total:,}",
            **rows,
            "checkpoint": f"{args.save} ({report.size(Path(args.save))})",
            "metrics": f"{args.save}/{training_checkpoint.FOLDER}/"
            "{metrics.jsonl,curves.png,tensorboard/}",
            **(report.cost(outcome.manifest) if outcome.manifest else {}),
        },
        next_step=f"MLM_MODEL_CKPT={args.save} bash mmlu.sh <conf>, then bash export.sh <conf>"
        if done
        else "the same command goes on from here",
    )


def main() -> None:
    # From the start: imports and loading take longer than a scheduler may wait.
    signals.defer_until_exit()
    args = arguments.parse_namespace("distill", add_arguments, check)
    from post_training.cli.stage import open_session

    with open_session(args) as session:
        outcome = distill(args, session)
        if session.is_main:
            show(args, outcome)
    if not outcome.finished:
        sys.exit(training_options.EXIT_UNFINISHED)


if __name__ == "__main__":
    main()
