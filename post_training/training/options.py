"""How a model is trained: the flags, with Megatron-LM's names, and their values. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from post_training.common.errors import UsageError
from post_training.config.checks import at_least, below_one, fraction, positive
from post_training.config.flags import flag, spelled
from post_training.config.options import StageOptions

DECAY_STYLES = ("constant", "linear", "cosine", "inverse-square-root")
# Ended by SIGTERM or SIGUSR1 (a time limit) or by a limit of its own, with everything saved: the
# same command resumes the run. It is EX_TEMPFAIL of sysexits.h.
EXIT_UNFINISHED = 75
SHORTEST_SEQUENCE = 8


_count = partial(flag, metavar="N", check=at_least(1))
_count_or_zero = partial(flag, metavar="N", check=at_least(0))
_value = partial(flag, metavar="X", check=at_least(0))


@dataclass(frozen=True, kw_only=True)
class TrainingFlags:
    """The flags. Sizes are in sequences or iterations (steps of the optimizer)."""

    TITLE: ClassVar[str] = "training"

    train_samples: int | None = _count(help="sequences to train on (%(default)s)")
    train_iters: int | None = _count(
        help="iterations to train, instead of --train-samples (%(default)s)"
    )
    micro_batch_size: int = _count(1, help="sequences a rank computes at a time (%(default)s)")
    global_batch_size: int | None = _count(help="sequences an iteration (micro batch size x DP)")
    lr: float = flag(5e-5, metavar="X", check=positive, help="highest learning rate (%(default)s)")
    min_lr: float = _value(1e-7, help="learning rate at the end (%(default)s)")
    lr_decay_style: str = flag(
        "cosine", choices=DECAY_STYLES, help="how the rate decays (%(default)s)"
    )
    lr_decay_iters: int | None = _count(help="iterations until --min-lr (all)")
    lr_decay_samples: int | None = _count(help="the same in sequences")
    lr_warmup_iters: int = _count_or_zero(
        0, help="iterations in which the rate rises (%(default)s)"
    )
    lr_warmup_samples: int | None = _count_or_zero(help="the same in sequences")
    lr_warmup_fraction: float | None = flag(
        metavar="X", check=fraction, help="the same as a part of all iterations"
    )
    weight_decay: float = _value(0.0, help="of AdamW (%(default)s)")
    clip_grad: float = _value(1.0, help="largest norm of the gradient, 0 for any (%(default)s)")
    adam_beta1: float = flag(0.9, metavar="X", check=below_one, help="of AdamW (%(default)s)")
    adam_beta2: float = flag(0.95, metavar="X", check=below_one, help="of AdamW (%(default)s)")
    adam_eps: float = _value(1e-8, help="of AdamW (%(default)s)")
    save_interval: int = _count(1000, help="iterations between checkpoints (%(default)s)")
    eval_interval: int = _count(1000, help="iterations between evaluations (%(default)s)")
    eval_iters: int = _count_or_zero(
        10, help="global batches an evaluation, at most; 0 for none (%(default)s)"
    )
    log_interval: int = _count(100, help="iterations that a log line averages (%(default)s)")
    exit_interval: int | None = _count(help="save and exit at a multiple of N iterations")
    exit_duration_in_mins: float | None = _value(help="save and exit after this time")
    keep_checkpoints: int = _count(2, help="newest iterations that stay on disk (%(default)s)")
    tensorboard_dir: str | None = flag(
        metavar="DIR", help="TensorBoard files (training/ in --save)"
    )


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(TrainingFlags):
    """The flags with everything decided: iterations, batch, warm-up and decay in iterations.

    An iteration is one step of the optimizer on ``global_batch_size`` sequences of ``seq_length``
    tokens, of which each data-parallel rank computes ``micro_batch_size`` at a time.
    """

    train_iters: int
    global_batch_size: int
    seq_length: int
    dtype: str
    seed: int

    def decides_results(self) -> dict[str, Any]:
        """The values that a resumed run must share with the run it continues, to be its equal."""
        names = (
            "global_batch_size seq_length lr min_lr lr_decay_style lr_decay_iters lr_warmup_iters "
            "weight_decay clip_grad adam_beta1 adam_beta2 adam_eps dtype seed train_iters"
        )
        return {name: getattr(self, name) for name in names.split()}


def decide(flags: TrainingFlags, options: StageOptions, seq_length: int) -> TrainingOptions:
    """The training that the flags state, for the stage's parallel sizes and precision.

    Raises:
        UsageError: for numbers that cannot work together.
    """
    _refuse_other_data(options.ignored_flags)
    ranks = options.parallel.data
    batch = flags.global_batch_size or flags.micro_batch_size * ranks
    if flags.lr < flags.min_lr:
        raise UsageError(
            f"--lr {flags.lr} --min-lr {flags.min_lr}",
            "the learning rate cannot decay to a higher one",
            "give --lr above --min-lr",
        )
    if batch % (flags.micro_batch_size * ranks):
        raise UsageError(
            f"--global-batch-size {batch}",
            f"it is no multiple of micro batch size {flags.micro_batch_size} x DP={ranks}",
            f"a multiple of {flags.micro_batch_size * ranks}",
        )
    if options.precision == "fp16":
        raise UsageError("--fp16", "its gradients would need loss scaling", "--bf16 or --fp32")
    at_least(SHORTEST_SEQUENCE)("--seq-length", seq_length)
    if options.sequence_parallel and seq_length % options.parallel.tensor:
        raise UsageError(
            f"--seq-length {seq_length} --sequence-parallel",
            f"TP={options.parallel.tensor} does not divide the sequence",
            f"a multiple of {options.parallel.tensor}",
        )
    iters = _iterations(flags, options, batch)
    warmup = _warmup(flags, options, batch, iters)
    decay = flags.lr_decay_iters
    if decay is None and flags.lr_decay_samples is not None:
        decay = -(-flags.lr_decay_samples // batch)
    if warmup >= (decay or iters):
        raise UsageError(
            f"warm-up of {warmup} iterations",
            f"the learning rate has decayed at iteration {decay or iters}",
            "a shorter warm-up (--lr-warmup-iters)",
        )
    decided: dict[str, Any] = {
        "train_iters": iters,
        "global_batch_size": batch,
        "lr_warmup_iters": warmup,
        "lr_decay_iters": decay,
    }
    return TrainingOptions(
        **vars(flags) | decided,
        seq_length=seq_length,
        dtype=options.precision,
        seed=options.seed,
    )


_INDEXED = "Megatron's indexed data sets (.bin, .idx) are not read here: they hold no text"
_OTHER_DATA = {
    "--mock-data": "random tokens teach a model nothing",
    **dict.fromkeys(
        """
        --data-args-path --data-path --per-split-data-args-path --test-data-path --train-data-path
        --valid-data-path
        """.split(),
        _INDEXED,
    ),
}


def _refuse_other_data(given: Sequence[str]) -> None:
    """Raise UsageError for data of Megatron-LM's, in place of which other data would be taken."""
    for flag_name, cause in _OTHER_DATA.items():
        if flag_name in given:
            raise UsageError(
                flag_name,
                cause,
                "name text or conversations: --finetune-data-files FILE... (JSONL, parquet, CSV) "
                "or --finetune-hf-dataset NAME",
            )


def _iterations(flags: TrainingFlags, options: StageOptions, batch: int) -> int:
    _only_one(options, "train_iters", "train_samples")
    iters, samples = flags.train_iters, flags.train_samples
    if iters is not None and ("train_iters" in options.given or samples is None):
        return iters
    if samples is None:
        raise RuntimeError(f"{options.stage} has no default number of iterations")
    return -(-samples // batch)


def _warmup(flags: TrainingFlags, options: StageOptions, batch: int, iters: int) -> int:
    _only_one(options, "lr_warmup_iters", "lr_warmup_samples", "lr_warmup_fraction")
    if flags.lr_warmup_fraction is not None:
        return int(flags.lr_warmup_fraction * iters)
    if flags.lr_warmup_samples is not None:
        return -(-flags.lr_warmup_samples // batch)
    return flags.lr_warmup_iters


def _only_one(options: StageOptions, *names: str) -> None:
    given = [f"{spelled(name)} {options.given[name]}" for name in names if name in options.given]
    if len(given) > 1:
        raise UsageError(" ".join(given), "they say the same in two units", "give one of them")
