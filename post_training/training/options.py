"""How a model is trained: the flags, with Megatron-LM's names, and their values. No torch."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from post_training.common.errors import UsageError
from post_training.config import arguments

DECAY_STYLES = ("constant", "linear", "cosine", "inverse-square-root")
# Ended by SIGTERM or SIGUSR1 (a time limit) or by a limit of its own, with everything saved: the
# same command goes on from there. It is EX_TEMPFAIL of sysexits.h.
EXIT_UNFINISHED = 75


@dataclass(frozen=True)
class TrainingOptions:
    """Sizes are in sequences (``*_batch_size``), tokens (``seq_length``) or iterations.

    An iteration is one step of the optimizer on ``global_batch_size`` sequences, of which each
    data-parallel rank computes ``micro_batch_size`` at a time.
    """

    train_iters: int
    global_batch_size: int = 1
    micro_batch_size: int = 1
    seq_length: int = 2048
    lr: float = 5e-5
    min_lr: float = 1e-7
    lr_decay_style: str = "cosine"
    lr_decay_iters: int | None = None
    lr_warmup_iters: int = 0
    weight_decay: float = 0.0
    clip_grad: float = 1.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    save_interval: int = 1000
    eval_interval: int = 1000
    eval_iters: int = 10
    log_interval: int = 100
    exit_interval: int | None = None
    exit_duration_in_mins: float | None = None
    keep_checkpoints: int = 2
    tensorboard_dir: str | None = None
    dtype: str = "bf16"
    seed: int = 1234

    def decides_results(self) -> dict[str, Any]:
        """The values that a resumed run must share with the run it continues, to be its equal."""
        names = (
            "global_batch_size seq_length lr min_lr lr_decay_style lr_decay_iters lr_warmup_iters "
            "weight_decay clip_grad adam_beta1 adam_beta2 adam_eps dtype seed train_iters"
        )
        return {name: getattr(self, name) for name in names.split()}


def add(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Add the training flags; ``defaults`` by name replace those of :class:`TrainingOptions`."""
    group = parser.add_argument_group("training")

    def value(name: str) -> Any:
        return defaults.get(name, getattr(TrainingOptions, name, None))

    def add(name: str, kind: type, meaning: str, **more: Any) -> None:
        default = value(name)
        shown = "" if default is None else " (%(default)s)"
        group.add_argument(
            "--" + name.replace("_", "-"), type=kind, default=default, help=meaning + shown, **more
        )

    add("train_samples", int, "sequences to train on", metavar="N")
    add("train_iters", int, "iterations to train, instead of --train-samples", metavar="N")
    add("micro_batch_size", int, "sequences a rank computes at a time", metavar="N")
    add("global_batch_size", int, "sequences an iteration (micro batch size x DP)", metavar="N")
    add("lr", float, "highest learning rate", metavar="X")
    add("min_lr", float, "learning rate at the end", metavar="X")
    add("lr_decay_style", str, "how it falls", choices=DECAY_STYLES)
    add("lr_decay_iters", int, "iterations until --min-lr (all)", metavar="N")
    add("lr_decay_samples", int, "the same in sequences", metavar="N")
    add("lr_warmup_iters", int, "iterations in which it rises", metavar="N")
    add("lr_warmup_samples", int, "the same in sequences", metavar="N")
    add("lr_warmup_fraction", float, "the same as a part of all iterations", metavar="X")
    add("weight_decay", float, "of AdamW", metavar="X")
    add("clip_grad", float, "largest norm of the gradient, 0 for any", metavar="X")
    add("adam_beta1", float, "of AdamW", metavar="X")
    add("adam_beta2", float, "of AdamW", metavar="X")
    add("adam_eps", float, "of AdamW", metavar="X")
    add("save_interval", int, "iterations between checkpoints", metavar="N")
    add("eval_interval", int, "iterations between evaluations", metavar="N")
    add("eval_iters", int, "global batches an evaluation, at most; 0 for none", metavar="N")
    add("log_interval", int, "iterations that a log line averages", metavar="N")
    add("exit_interval", int, "save and end at a multiple of N iterations", metavar="N")
    add("exit_duration_in_mins", float, "save and end after this time", metavar="X")
    add("keep_checkpoints", int, "newest iterations that stay on disk", metavar="N")
    group.add_argument(
        "--tensorboard-dir", metavar="DIR", help="TensorBoard files (training/ in --save)"
    )


def options(args: argparse.Namespace, **defaults: Any) -> TrainingOptions:
    """The options that the flags state.

    Raises:
        UsageError: for numbers that cannot work, alone or together.
    """
    given: Mapping[str, Any] = args.explicit
    ranks = arguments.parallel(args).data
    batch = args.global_batch_size if "global_batch_size" in given else None
    batch = batch or args.micro_batch_size * ranks
    for name in ("micro_batch_size", "save_interval", "eval_interval", "log_interval",
                 "keep_checkpoints"):  # fmt: skip
        _at_least(name, getattr(args, name), 1)
    for name in ("min_lr", "weight_decay", "clip_grad", "eval_iters"):
        _at_least(name, getattr(args, name), 0)
    for name in ("train_iters", "train_samples", "lr_warmup_iters", "exit_interval"):
        if given.get(name) is not None:
            _at_least(name, given[name], 1 if name != "lr_warmup_iters" else 0)
    if args.lr <= 0 or args.lr < args.min_lr:
        raise UsageError(
            f"--lr {args.lr} --min-lr {args.min_lr}", "the rate cannot fall so", "--lr above both"
        )
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(args, name) < 1:
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"{flag} {getattr(args, name)}", "not in [0, 1)", "e.g. 0.9")
    if batch % (args.micro_batch_size * ranks):
        raise UsageError(
            f"--global-batch-size {batch}",
            f"it is no multiple of micro batch size {args.micro_batch_size} x DP={ranks}",
            f"a multiple of {args.micro_batch_size * ranks}",
        )
    dtype = arguments.precision(args)
    if dtype == "fp16":
        raise UsageError("--fp16", "its gradients would need loss scaling", "--bf16 or --fp32")
    iters = _iterations(args, given, batch)
    warmup = _warmup(args, given, batch, iters)
    decay = args.lr_decay_iters
    if decay is None and args.lr_decay_samples is not None:
        decay = -(-args.lr_decay_samples // batch)
    if warmup >= (decay or iters):
        raise UsageError(
            f"warm-up of {warmup} iterations", f"the rate ends its fall at {decay or iters}",
            "a shorter warm-up (--lr-warmup-iters)",
        )  # fmt: skip
    names = TrainingOptions.__dataclass_fields__
    taken = {n: getattr(args, n) for n in names if hasattr(args, n)}
    if not taken.get("seq_length"):
        taken["seq_length"] = defaults.get("seq_length", TrainingOptions.seq_length)
    _at_least("seq_length", taken["seq_length"], 8)
    return TrainingOptions(
        **{
            **taken,
            "train_iters": iters,
            "global_batch_size": batch,
            "lr_warmup_iters": warmup,
            "lr_decay_iters": decay,
            "dtype": dtype,
        }
    )


def _iterations(args: argparse.Namespace, given: Mapping[str, Any], batch: int) -> int:
    if "train_iters" in given and "train_samples" in given:
        raise UsageError(
            f"--train-iters {args.train_iters} --train-samples {args.train_samples}",
            "they say the same in two units",
            "give one of them",
        )
    if "train_iters" in given or args.train_samples is None:
        return int(args.train_iters)
    return -(-int(args.train_samples) // batch)


def _warmup(args: argparse.Namespace, given: Mapping[str, Any], batch: int, iters: int) -> int:
    stated = [n for n in given if n.startswith("lr_warmup") and given[n] is not None]
    if len(stated) > 1:
        flags = " ".join("--" + name.replace("_", "-") for name in stated)
        raise UsageError(flags, "they say the same in several units", "give one of them")
    if args.lr_warmup_fraction is not None:
        return int(args.lr_warmup_fraction * iters)
    if args.lr_warmup_samples is not None:
        return -(-int(args.lr_warmup_samples) // batch)
    return int(args.lr_warmup_iters or 0)


def _at_least(name: str, value: float, least: int) -> None:
    if value < least:
        flag = "--" + name.replace("_", "-")
        raise UsageError(f"{flag} {value}", f"it is less than {least}", f"{least} or more")
