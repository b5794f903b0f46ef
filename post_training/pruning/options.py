"""What a prune command asks for: named sizes or a search, and where to look. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from post_training.common import manifest
from post_training.common.errors import UsageError
from post_training.config import quantities
from post_training.config.checks import at_least, below_one, check_choice
from post_training.config.flags import flag, group, spelled
from post_training.config.options import StageOptions
from post_training.data.options import CalibrationOptions
from post_training.evaluation.options import MmluOptions
from post_training.inference.smoke_generation import SmokeOptions
from post_training.models.families import registry as families
from post_training.pruning.score_cache import ScoreCache
from post_training.pruning.space import MEANINGS, STEPS, PruningSpace, read_sizes

if TYPE_CHECKING:
    from post_training.checkpoints.source import Source
    from post_training.models.architecture import Architecture

_TARGETS = {
    "prune_target_params": quantities.COUNTS,
    "prune_target_active_params": quantities.COUNTS,
    "prune_target_memory": quantities.BYTES,
}


@dataclass(frozen=True)
class Memory:
    """What memory is counted for: 16-bit weights and the cache of these tokens."""

    sequence_length: int = 4096
    batch_size: int = 1


@dataclass(frozen=True)
class SizeSearch:
    """Limits that the pruned model must meet, and where to look for it.

    Attributes:
        limits: ``params``, ``active_params`` and ``memory`` (bytes), those that are given.
        max_width: largest share of a width's choices that may be cut.
        max_depth: the same for the depth.
        top_k: candidates that are scored: the largest ones within the limits.
        skip: hyper-parameters that stay as they are.
        memory: what memory is counted for.
    """

    limits: Mapping[str, float]
    max_width: float = 0.4
    max_depth: float = 0.2
    top_k: int = 10
    skip: tuple[str, ...] = ()
    memory: Memory = Memory()


def _known_names(option: str, text: str) -> None:
    for name in _split(text):
        check_choice(option, name, list(MEANINGS))


def _split(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


_count = partial(flag, metavar="N", check=at_least(1))
_share = partial(flag, metavar="X", check=below_one)


def _divisor(name: str) -> Any:
    return _count(
        help=f"step of the allowed {MEANINGS[name]} ({STEPS[name]}, less for small models)"
    )


@dataclass(frozen=True, kw_only=True)
class PruneOptions(StageOptions):
    prune_export_config: str | None = flag(
        metavar="JSON",
        help="new sizes, as a JSON object or a file with one; keys: " + ", ".join(MEANINGS),
    )
    prune_target_params: str | None = flag(
        metavar="N", help="search for at most N parameters: 6e9, 6B"
    )
    prune_target_active_params: str | None = flag(
        metavar="N", help="search for at most N parameters used per token"
    )
    prune_target_memory: str | None = flag(
        metavar="BYTES",
        help="search for weights and cache of at most BYTES: 12e9, 12GB, 12GiB",
    )
    prune_memory_sequence_length: int = _count(
        4096, help="tokens whose cache counts as memory (%(default)s)"
    )
    prune_memory_batch_size: int = _count(
        1, help="sequences whose cache counts as memory (%(default)s)"
    )
    prune_top_k: int = _count(
        10, help="candidates that a search scores, the largest that meet the target (%(default)s)"
    )
    prune_max_width_pruning: float = _share(
        0.4, help="share of each width's values that a search may cut (%(default)s)"
    )
    prune_max_depth_pruning: float = _share(
        0.2, help="share of the layers that a search may cut (%(default)s)"
    )
    prune_hparams_to_skip: str = flag(
        "", metavar="A,B", check=_known_names, help="sizes that a search leaves as they are"
    )
    prune_hidden_size_divisor: int | None = _divisor("hidden_size")
    prune_ffn_hidden_size_divisor: int | None = _divisor("ffn_hidden_size")
    prune_num_layers_divisor: int | None = _divisor("num_layers")
    prune_num_moe_experts_divisor: int | None = _divisor("num_moe_experts")
    prune_mamba_head_dim_divisor: int | None = _divisor("mamba_head_dim")
    prune_intermediate_ckpt: str | None = flag(
        metavar="DIR",
        help="keep the scores here; a later run with another target takes them from there",
    )
    prune_score_size: int = flag(
        16,
        metavar="N",
        check=at_least(0),
        help="calibration sequences for the perplexity, which also scores candidates without "
        "--mmlu-dataset; 0: none (%(default)s)",
    )
    calibration: CalibrationOptions = group(CalibrationOptions)
    mmlu: MmluOptions = group(MmluOptions)
    smoke: SmokeOptions = group(SmokeOptions)

    @property
    def memory(self) -> Memory:
        return Memory(self.prune_memory_sequence_length, self.prune_memory_batch_size)


def check_parallel(options: PruneOptions) -> None:
    """Raise UsageError unless one replica of the model is spread over pipeline stages only."""
    sizes = options.parallel
    cut = "ModelOpt ranks and cuts whole tensors: pruning runs at TP=1, EP=1 and CP=1"
    tied = "ModelOpt ties the widths of one replica together, not of several"
    asked = {
        "TP": (sizes.tensor, cut),
        "EP": (sizes.expert, cut),
        "CP": (sizes.context, cut),
        "DP": (sizes.data, tied),
    }
    for name, (size, cause) in asked.items():
        if size > 1:
            remedy = f"{name}=1; PP spreads a large model over processes (PP={size})"
            raise UsageError(f"{name}={size}", cause, remedy)


def target(options: PruneOptions) -> dict[str, Any] | SizeSearch:
    """The sizes that ``--prune-export-config`` names, or the search for them.

    Raises:
        UsageError: unless exactly one kind is given, in a form that can be read, and a search has
            something to score its candidates by.
    """
    texts = {name: getattr(options, name) for name in _TARGETS}
    given = {spelled(name): (name, text) for name, text in texts.items() if text is not None}
    if options.prune_export_config is not None:
        if given:
            raise UsageError(
                f"--prune-export-config with {' '.join(given)}",
                "sizes are either named or searched for",
                "give one of them",
            )
        return read_sizes(options.prune_export_config)
    if not given:
        raise UsageError(
            "what to prune (not given)",
            "neither sizes nor a target is named",
            """--prune-export-config '{"num_layers": 24}', --prune-target-params 6e9, """
            "or --prune-target-memory 12GB",
        )
    if not options.mmlu.mmlu_dataset and not options.prune_score_size:
        raise UsageError(
            "--prune-score-size 0",
            "a search scores its candidates, by perplexity or on --mmlu-dataset",
            "leave it out, or give --mmlu-dataset",
        )
    limits = {
        name.removeprefix("prune_target_"): quantities.read(option, text, _TARGETS[name])
        for option, (name, text) in given.items()
    }
    width, depth = options.prune_max_width_pruning, options.prune_max_depth_pruning
    skip = _split(options.prune_hparams_to_skip)
    # ModelOpt finds no candidate with a share of 0: nothing to cut is a size to skip.
    skip += tuple(name for name in MEANINGS if not (depth if name == "num_layers" else width))
    return SizeSearch(limits, width, depth, options.prune_top_k, skip, options.memory)


def space(options: PruneOptions, architecture: Architecture) -> PruningSpace:
    """What may be pruned of this model, in steps as given or as they fit it.

    UsageError for a model of a family that cannot be pruned.
    """
    reason = families.family_of(architecture).not_pruned
    if architecture.is_hybrid:
        reason = "its layers have one part each, and cutting them was not tried here"
    if unread := architecture.unfusable_norms:
        reason = (
            "pruning needs Transformer Engine's layers, which fuse each norm with the linear layer "
            f"after it, and ModelOpt's importer does not read {unread} there"
        )
    if reason:
        raise UsageError(
            f"prune a {architecture.huggingface_architecture or 'model of these flags'}",
            f"such models cannot be pruned: {reason}",
            "prune a model of another family (docs/models.md has the table)",
        )
    steps = {name: getattr(options, f"prune_{name}_divisor") for name in STEPS}
    return PruningSpace.of(architecture, steps)


def cache(options: PruneOptions, source: Source) -> ScoreCache | None:
    """Where scores are kept, if anywhere, with what they depend on."""
    if not options.prune_intermediate_ckpt:
        return None
    apart = (*_TARGETS, "prune_export_config", "prune_intermediate_ckpt", "prune_top_k")
    names = [field.name for field in fields(options) if field.name.startswith("prune_")]
    search = {name: getattr(options, name) for name in names if name not in apart}
    search |= {n: getattr(options.mmlu, n) for n in ("mmlu_dataset", "fraction", "few_shots")}
    sizes = options.parallel
    layout = {n: getattr(sizes, n) for n in ("pipeline", "first_layers", "last_layers")}
    model = manifest.describe_input("model", source.location)
    return ScoreCache(Path(options.prune_intermediate_ckpt), model, layout, search)
