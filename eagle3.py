"""Train an EAGLE-3 draft for a model: online from conversations, or offline from stored features.

Inputs:  --load, a Megatron checkpoint (a quantized one too), or --pretrained-model-path, a Hugging
         Face folder or hub name; --finetune-hf-dataset or --finetune-data-files, conversations
         whose answers the model itself wrote, or --offline-distillation-data, what
         extract_features.sh stored.
Outputs: --save, a checkpoint of target and draft for each --save-interval, with run.json; in its
         folder training/ metrics.jsonl, curves.png and TensorBoard files.

A draft is attached where the checkpoint has none. Started again, the same command goes on where it
was interrupted. Ended by SIGTERM, SIGUSR1 or a limit, it saves and leaves with exit code 75.

    HF_MODEL_CKPT=/models/Qwen3-0.6B bash eagle3.sh Qwen/Qwen3-0.6B \\
        --finetune-data-files /data/answers.jsonl
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from post_training.checkpoints import loading, torch_dist
from post_training.checkpoints.source import fetch_source, find_source, size_estimate
from post_training.common import files, outputs
from post_training.common.errors import UsageError
from post_training.config import arguments, checks
from post_training.data import conversation_data
from post_training.distributed import signals
from post_training.drafts import features as draft_features
from post_training.drafts import options as draft_arguments
from post_training.drafts.eagle3.draft import DTYPES
from post_training.drafts.record import draft_of
from post_training.models import parallel_check
from post_training.training import checkpoint as training_checkpoint
from post_training.training import options as training_options

if TYPE_CHECKING:
    from post_training.checkpoints.source import Source
    from post_training.distributed.session import Session
    from post_training.training.options import TrainingOptions
    from post_training.training.trainer import Outcome

logger = logging.getLogger("post_training")

SAMPLES = 128_000
SEQUENCE_LENGTH = 2048  # or the model's longest text
# Relative difference between stored states and those computed again: rounding on other devices.
SAME_STATES = {"fp32": 1e-3, "bf16": 5e-2}
DATASET = "Magpie-Align/Magpie-Llama-3.1-Pro-MT-300K-Filtered"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    conversation_data.add_arguments(parser, DATASET)
    group = parser.add_argument_group("eagle3")
    group.add_argument(
        "--offline-distillation-data",
        metavar="DIR",
        help="train from what extract_features.sh wrote there, without running the target",
    )
    group.add_argument(
        "--show-loss-mask",
        type=int,
        metavar="N",
        help="show the first N conversations with their answers marked, and leave",
    )
    group.add_argument(
        "--eval-prompts",
        type=int,
        default=16,
        metavar="N",
        help="held-out prompts on which evaluations measure the acceptance length (%(default)s)",
    )
    group.add_argument(
        "--eval-output-len", type=int, default=48, metavar="N", help="tokens each (%(default)s)"
    )
    draft_arguments.add(parser)
    training_options.add(parser, train_samples=SAMPLES)


def check(args: argparse.Namespace) -> None:
    checks.required(args, "--save", "MLM_MODEL_SAVE")
    source = find_source(args)
    if source.described is not None and not args.seq_length:
        args.seq_length = min(SEQUENCE_LENGTH, source.described.max_position_embeddings)
    options = read_options(args)
    if args.context_parallel_size > 1:
        raise UsageError(
            f"CP={args.context_parallel_size}", "sequences are not divided here", "CP=1; raise DP"
        )
    if args.show_loss_mask is not None and args.show_loss_mask < 1:
        raise UsageError(f"--show-loss-mask {args.show_loss_mask}", "it shows some", "1 or more")
    for name in ("eval_prompts", "eval_output_len"):
        if getattr(args, name) < (name == "eval_output_len"):
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"{flag} {getattr(args, name)}", "it is too small", "1 or more")
    offline = bool(args.offline_distillation_data)
    if source.described is not None:
        parallel_check.check(source.described, arguments.parallel(args))
        limit = source.described.max_position_embeddings
        if options.seq_length > limit:
            raise UsageError(
                f"--seq-length {options.seq_length}",
                f"the model's texts have at most {limit} tokens",
                f"--seq-length {limit}",
            )
        _check_draft(args, source, offline)
    if offline:
        draft_features.check(args, source, options.seq_length)
    else:
        conversation_data.check(conversation_data.source(args))
    needed = 2 * size_estimate(source, 2)  # two checkpoints, of which one is being written
    outputs.disk_space(Path(args.save), needed)


def read_options(args: argparse.Namespace) -> TrainingOptions:
    """The training options; stored features have a sequence length of their own."""
    if args.offline_distillation_data and "seq_length" not in args.explicit:
        args.seq_length = draft_features.sequence_length(Path(args.offline_distillation_data))
    return training_options.options(args, seq_length=SEQUENCE_LENGTH)


def find_source(args: argparse.Namespace) -> Source:
    """The model to train: the run in --save, if there is one to go on with, else the given one."""
    folder = Path(args.save)
    goes_on = training_checkpoint.goes_on(folder, args.overwrite)
    overwrite = args.overwrite and not goes_on
    training_checkpoint.check_folder(
        folder, "eagle3", overwrite, "convert", args.explicit.get("load")
    )
    if not overwrite and (folder / torch_dist.TRACKER).is_file():
        args.load = args.save
        source = find_source(args)
        if draft_of(source) is None:
            raise UsageError(
                f"output folder {folder}",
                "it holds a checkpoint without a draft",
                "name another folder in MLM_MODEL_SAVE, and this one in MLM_MODEL_CKPT",
            )
        return source
    return find_source(args)


def _check_draft(args: argparse.Namespace, source: Source, offline: bool) -> None:
    """The draft's flags, and that they do not contradict the draft that there is."""
    recorded = draft_of(source)
    planned = draft_arguments.plan(args, source.architecture)
    if recorded is None:
        return
    made, wanted = recorded.config["torch_dtype"], DTYPES[arguments.precision(args)]
    if made != wanted:
        flag = next(f"--{name}" for name, dtype in DTYPES.items() if dtype == made)
        raise UsageError(
            f"{source.location} trained in {wanted}",
            f"its draft was made in {made}",
            f"add {flag}, or make the draft again in {wanted}",
        )
    given = {name for name in draft_arguments.NAMES if name in args.explicit}
    wrong = [
        ("--ttt-steps", "ttt_steps", planned.ttt_steps, recorded.ttt_steps),
        ("--mix-hidden-states", "mix_hidden_states", planned.mix_hidden_states,
         recorded.mix_hidden_states),
        ("--draft-vocab-size", "draft_vocab_size", planned.config["draft_vocab_size"],
         recorded.config["draft_vocab_size"]),
    ]  # fmt: skip
    if "eagle_config" in given:
        wrong += [
            (f"--eagle-config {key}", "eagle_config", value, recorded.config.get(key))
            for key, value in planned.config.items()
        ]
    for flag, name, now, before in wrong:
        if name in given and now != before:
            raise UsageError(
                f"{flag} {now}", f"the draft in {source.location} was made with {before}",
                "leave it out, or begin anew in another folder",
            )  # fmt: skip
    if recorded.offline and not offline:
        raise UsageError(
            f"--load {source.location}",
            "it was made without the target's layers (--export-offline-model)",
            "give --offline-distillation-data, or a checkpoint with its layers",
        )


def eagle3(args: argparse.Namespace, session: Session) -> Outcome:
    """Train to the end, or to an interruption.

    Raises:
        UsageError: for data that cannot be trained on.
    """
    from post_training.checkpoints import huggingface
    from post_training.common.manifest import Manifest
    from post_training.drafts.eagle3 import attach as eagle
    from post_training.drafts.eagle3 import task as eagle_training
    from post_training.models.builder import count_parameters
    from post_training.training.checkpoint import TrainingCheckpoints
    from post_training.training.setup import leave_if_asked
    from post_training.training.trainer import Trainer

    leave_if_asked(session)
    options = read_options(args)
    source = fetch_source(find_source(args), args)
    resume = training_checkpoint.goes_on(Path(args.save), args.overwrite)
    small_files = loading.local_huggingface(source, args)
    train, valid, prompts = samples(args, source, session)
    leave_if_asked(session)
    model = loading.load(source, args, session)
    draft = draft_of(source) or draft_arguments.plan(args, source.architecture)
    if draft_of(source) is None:
        eagle.attach(model, draft, args.seed)
    if draft.has_own_vocabulary and not draft.trained:
        counts = conversation_data.frequencies(train, draft.config["vocab_size"])
        covered = eagle.set_vocabulary(model, counts)
        logger.info(
            "draft vocabulary: %d of %d tokens, %.2f %% of the answers",
            draft.config["draft_vocab_size"], draft.config["vocab_size"], 100 * covered,
        )  # fmt: skip
    eagle.freeze_target(model)
    if args.offline_distillation_data:
        draft_features.require_same_model(
            model, Path(args.offline_distillation_data), train, SAME_STATES[options.dtype]
        )
    metrics: dict[str, Any] = {"parameters": count_parameters(model)}
    leave_if_asked(session)

    inputs = [*source.inputs(), *_data_inputs(args)]
    if resume:
        # The run itself is where it goes on, not what it was made from.
        inputs = list((source.manifest or {})["inputs"])

    def record(iteration: int) -> Manifest:
        return Manifest(
            "eagle3",
            source.architecture.to_json(),
            configuration=arguments.explicit(args),
            inputs=inputs,
            metrics={**metrics, **trainer.metrics},
            started=session.started,
            peak_memory_bytes=session.peak_memory(),
            extra={
                **source.carried(),
                "draft": replace(draft, trained=iteration).to_json(),
                "complete": iteration >= options.train_iters,
            },
        )

    trainer = Trainer(
        model,
        eagle_training.task(model, draft),
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
        evaluate=acceptance(args, model, source, prompts),
    )
    return trainer.run(train, valid)


def acceptance(
    args: argparse.Namespace, model: Any, source: Source, prompts: list[list[int]]
) -> Callable[[int], dict[str, float]] | None:
    """What an evaluation measures by decoding for real; None where that cannot be done."""
    from post_training.drafts.eagle3 import decoding as speculative

    offline = draft_of(source) is not None and draft_of(source).offline
    if offline or not prompts or not speculative.can_verify(model):
        return None
    tokenizer = loading.tokenizer(source, args)
    ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    steps = min(3, int(model.eagle_ttt_steps))

    def measure(_iteration: int) -> dict[str, float]:
        found = speculative.measure(
            model,
            prompts,
            args.eval_output_len,
            ends,
            steps=steps,
            vocab_size=len(tokenizer),
        )
        return {} if found.length is None else {"acceptance_length": found.length}

    return measure


def samples(
    args: argparse.Namespace, source: Source, session: Session
) -> tuple[Any, Any, list[list[int]]]:
    """Data to train on, held-out data, and held-out prompts; a collective call."""
    options = read_options(args)
    if args.offline_distillation_data:
        folder = Path(args.offline_distillation_data)
        features = draft_features.load(folder)
        prompts = files.read_json(folder / conversation_data.PROMPTS) or []
        return features["train"], features["valid"], prompts[: args.eval_prompts]
    tokenizer = loading.tokenizer(source, args)
    rows = options.train_iters * options.global_batch_size
    parts, content = conversation_data.prepare(
        conversation_data.source(args),
        tokenizer,
        options.seq_length,
        rows,
        Path(args.save) / training_checkpoint.FOLDER / "data",
        session.show_progress,
    )
    logger.info("training data: %s", conversation_data.describe(content))
    prompts = files.read_json(Path(content["prompts"])) or []
    return parts["train"], parts["valid"], prompts[: args.eval_prompts]


def show_loss_mask(args: argparse.Namespace) -> None:
    """Print conversations as the target reads them, with their answers marked."""
    source = fetch_source(find_source(args), args)
    tokenizer = loading.tokenizer(source, args)
    for text in conversation_data.shown(
        conversation_data.source(args), tokenizer, args.show_loss_mask, sys.stdout.isatty()
    ):
        print(text)


def _data_inputs(args: argparse.Namespace) -> list[dict[str, Any]]:
    from post_training.common import manifest

    if args.offline_distillation_data:
        return [manifest.describe_input("features", args.offline_distillation_data)]
    return [{"role": "data", "path": conversation_data.source(args).describe()}]


def show(args: argparse.Namespace, outcome: Outcome) -> None:
    """Print the summary."""
    from post_training.common import report

    found = outcome.metrics
    steps = [name for name in found if name.startswith("eval_accuracy_")]
    report.summary(
        "draft trained" if outcome.finished else "interrupted, and saved",
        {
            "iterations": f"{outcome.iteration:,} of {read_options(args).train_iters:,}",
            "loss": f"{found['loss']:.4f}" if "loss" in found else "-",
            "accuracy by step (held out)": ", ".join(f"{found[n]:.3f}" for n in steps) or "-",
            "acceptance length (held out)": f"{found['eval_acceptance_length']:.2f}"
            if "eval_acceptance_length" in found
            else "-",
            "checkpoint": f"{args.save} ({report.size(Path(args.save))})",
            "metrics": f"{args.save}/{training_checkpoint.FOLDER}/"
            "{metrics.jsonl,curves.png,tensorboard/}",
            **(report.cost(outcome.manifest) if outcome.manifest else {}),
        },
        next_step=f"MLM_MODEL_CKPT={args.save} bash validate.sh <conf> --steps 3"
        if outcome.finished
        else "the same command goes on from here",
    )


def main() -> None:
    # From the start: imports and loading take longer than a scheduler may wait.
    signals.defer_until_exit()
    args = arguments.parse_namespace("eagle3", add_arguments, check)
    from post_training.cli.stage import open_session

    with open_session(args) as session:
        if args.show_loss_mask:
            if session.is_main:
                show_loss_mask(args)
            return
        outcome = eagle3(args, session)
        if session.is_main:
            show(args, outcome)
    if not outcome.finished:
        sys.exit(training_options.EXIT_UNFINISHED)


if __name__ == "__main__":
    main()
