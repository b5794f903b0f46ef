"""What a prune command asks for: named sizes or a search, and where to look. No torch."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from post_training.common import manifest
from post_training.common.errors import UsageError
from post_training.config import arguments, checks
from post_training.data import options as calibration_options
from post_training.pruning import score_cache
from post_training.pruning import space as pruning_space
from post_training.pruning.space import MEANINGS, Dimension, Granularity

if TYPE_CHECKING:
    from post_training.checkpoints.source import Source
    from post_training.models.architecture import Architecture

_DIVISORS = ("hidden_size", "ffn_hidden_size", "num_layers", "num_moe_experts", "mamba_head_dim")
_TARGETS = ("prune_target_params", "prune_target_active_params", "prune_target_memory")
_UNITS = {"": 1, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
_BYTE_UNITS = {
    "": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip


def add_arguments(add: Any) -> None:
    """Add the flags with ``add``, the ``add_argument`` of a parser or of its group."""
    add(
        "--prune-export-config",
        metavar="JSON",
        help="new sizes, as a JSON object or a file with one; keys: " + ", ".join(MEANINGS),
    )
    add("--prune-target-params", metavar="N", help="search for at most N parameters: 6e9, 6B")
    add("--prune-target-active-params", metavar="N", help="the same of those used for a token")
    add(
        "--prune-target-memory",
        metavar="BYTES",
        help="search for weights and cache of at most BYTES: 12e9, 12GB, 12GiB",
    )
    add(
        "--prune-memory-sequence-length",
        type=int,
        default=4096,
        metavar="N",
        help="tokens whose cache counts as memory (%(default)s)",
    )
    add(
        "--prune-memory-batch-size",
        type=int,
        default=1,
        metavar="N",
        help="sequences whose cache counts as memory (%(default)s)",
    )
    add(
        "--prune-top-k",
        type=int,
        default=10,
        metavar="N",
        help="candidates that a search scores, the largest that meet the target (%(default)s)",
    )
    add(
        "--prune-max-width-pruning",
        type=float,
        default=0.4,
        metavar="X",
        help="share of each width's values that a search may cut (%(default)s)",
    )
    add(
        "--prune-max-depth-pruning",
        type=float,
        default=0.2,
        metavar="X",
        help="share of the layers that a search may cut (%(default)s)",
    )
    add(
        "--prune-hparams-to-skip",
        default="",
        metavar="A,B",
        help="sizes that a search leaves as they are",
    )
    for name in _DIVISORS:
        add(
            f"--prune-{name.replace('_', '-')}-divisor",
            type=int,
            metavar="N",
            help=f"step of the allowed {MEANINGS[name]} "
            f"({getattr(Granularity, name)}, less for small models)",
        )
    add(
        "--prune-intermediate-ckpt",
        metavar="DIR",
        help="keep the scores here; a later run with another target takes them from there",
    )
    add(
        "--prune-score-size",
        type=int,
        default=16,
        metavar="N",
        help="calibration sequences for the perplexity, which also scores candidates without "
        "--mmlu-dataset; 0: none (%(default)s)",
    )


def check_parallel(args: argparse.Namespace) -> None:
    """Raise UsageError unless one copy of the model is spread over pipeline stages only."""
    for name, size in (
        ("TP", args.tensor_model_parallel_size),
        ("EP", args.expert_model_parallel_size),
        ("CP", args.context_parallel_size),
    ):
        if size > 1:
            raise UsageError(
                f"{name}={size}",
                "ModelOpt ranks and cuts whole tensors: pruning runs at TP=1, EP=1 and CP=1",
                f"{name}=1; PP spreads a large model over processes (PP={size})",
            )
    copies = arguments.parallel(args).data
    if copies > 1:
        raise UsageError(
            f"DP={copies}",
            "ModelOpt ties the widths of one copy of the model together, not of several",
            "DP=1; PP spreads a large model over processes",
        )


def check_search(args: argparse.Namespace, searching: bool) -> None:
    """Raise UsageError for settings of a search that cannot be."""
    positive = ["prune_top_k", "prune_memory_sequence_length", "prune_memory_batch_size"]
    positive += [f"prune_{name}_divisor" for name in _DIVISORS]
    for name in positive:
        if getattr(args, name) is not None:
            calibration_options.positive(args, name)
    if args.prune_score_size < 0:
        raise UsageError(f"--prune-score-size {args.prune_score_size}", "it is negative", "give 0")
    for name in ("prune_max_width_pruning", "prune_max_depth_pruning"):
        if not 0 <= getattr(args, name) < 1:
            flag = f"--{name.replace('_', '-')} {getattr(args, name)}"
            raise UsageError(flag, "it is no share below 1", "give e.g. 0.4")
    for name in skipped(args):
        checks.check_choice("--prune-hparams-to-skip", name, list(MEANINGS))
    if searching and not args.mmlu_dataset and not args.prune_score_size:
        raise UsageError(
            "--prune-score-size 0",
            "a search scores its candidates, by perplexity or on --mmlu-dataset",
            "leave it out, or give --mmlu-dataset",
        )


def targets(args: argparse.Namespace) -> tuple[dict[str, float], dict[str, Any] | None]:
    """Limits of a search by name, or the sizes that --prune-export-config names.

    Raises:
        UsageError: unless exactly one kind is given, in a form that can be read.
    """
    given = [name for name in _TARGETS if getattr(args, name) is not None]
    flags = [f"--{name.replace('_', '-')}" for name in given]
    if args.prune_export_config is not None:
        if given:
            raise UsageError(
                f"--prune-export-config with {' '.join(flags)}",
                "sizes are either named or searched for",
                "give one of them",
            )
        return {}, pruning_space.read_export_config(args.prune_export_config)
    if not given:
        raise UsageError(
            "what to prune (not given)",
            "neither sizes nor a target is named",
            """--prune-export-config '{"num_layers": 24}', --prune-target-params 6e9, """
            "or --prune-target-memory 12GB",
        )
    limits = {}
    for name, flag in zip(given, flags, strict=True):
        units = _BYTE_UNITS if name == "prune_target_memory" else _UNITS
        limits[name.removeprefix("prune_target_")] = quantity(flag, getattr(args, name), units)
    return limits, None


def quantity(flag: str, text: str, units: dict[str, float]) -> float:
    """A number with one of ``units``: ``6e9``, ``6B``, ``12 GiB``."""
    found = re.fullmatch(r"([0-9.]+(?:e[+]?[0-9]+)?)\s*([a-z]*)", text.strip().lower())
    known = ", ".join(name.upper() for name in units if name)
    try:
        value = float(found[1]) * units[found[2]] if found else 0.0
    except (KeyError, ValueError):
        value = 0.0
    if not value:
        raise UsageError(f"{flag} {text}", "it is not a positive number", f"6e9, or with {known}")
    return value


def skipped(args: argparse.Namespace) -> tuple[str, ...]:
    """Names that --prune-hparams-to-skip lists."""
    return tuple(name.strip() for name in args.prune_hparams_to_skip.split(",") if name.strip())


def granularity(args: argparse.Namespace, architecture: Architecture) -> Granularity:
    """The steps of the widths, as given or as they fit the model."""
    chosen = {name: getattr(args, f"prune_{name}_divisor") for name in _DIVISORS}
    return Granularity.of(architecture, chosen)


def dimensions(args: argparse.Namespace, architecture: Architecture) -> dict[str, Dimension]:
    """What may be pruned of this model."""
    return pruning_space.dimensions(architecture, granularity(args, architecture))


def cache(args: argparse.Namespace, source: Source) -> score_cache.ScoreCache | None:
    """Where scores are kept, if anywhere, with what they depend on."""
    if not args.prune_intermediate_ckpt:
        return None
    sizes = arguments.parallel(args)
    search = {name: value for name, value in vars(args).items() if name.startswith("prune_")}
    search |= {n: getattr(args, n) for n in ("mmlu_dataset", "fraction", "few_shots")}
    for name in (*_TARGETS, "prune_export_config", "prune_intermediate_ckpt", "prune_top_k"):
        search.pop(name)
    return score_cache.ScoreCache(
        Path(args.prune_intermediate_ckpt),
        manifest.describe_input("model", source.location),
        {
            "pipeline": sizes.pipeline,
            "first_layers": sizes.first_layers,
            "last_layers": sizes.last_layers,
        },
        search,
    )
