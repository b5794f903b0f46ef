"""Prune a model's widths and depth (Minitron); save a smaller Megatron checkpoint.

Inputs:  --load, a Megatron checkpoint, or --pretrained-model-path, a Hugging Face folder or hub
         name; --prune-export-config, the new sizes, or --prune-target-params or
         --prune-target-memory, limits for a search; --calib-dataset, text to rank channels by.
Outputs: --save, a checkpoint of the smaller model, with run.json. It carries its architecture, so
         later stages take the conf of the original. It needs distillation (distill.sh) before use.

    MLM_MODEL_CKPT=/work/Qwen3-8B_mlm bash prune.sh Qwen/Qwen3-8B --prune-target-params 6e9
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from post_training.checkpoints import loading, torch_dist
from post_training.checkpoints.source import fetch_source, find_source, size_estimate
from post_training.common import outputs
from post_training.common.errors import UsageError
from post_training.config import arguments, checks
from post_training.data import options as calibration_options
from post_training.evaluation import options as mmlu_options
from post_training.inference import smoke_generation
from post_training.models import parallel_check
from post_training.pruning import options as pruning_choice
from post_training.pruning import space as pruning_space

if TYPE_CHECKING:
    from megatron.core.transformer import MegatronModule

    from post_training.distributed.session import Session
    from post_training.models.architecture import Architecture
    from post_training.pruning.search import Search

logger = logging.getLogger("post_training")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("prune").add_argument
    pruning_choice.add_arguments(add)
    calibration_options.add_arguments(add)
    mmlu_options.add_arguments(add, None, "no MMLU; with it: accuracy before, after, of candidates")
    smoke_generation.add_arguments(add)


def check(args: argparse.Namespace) -> None:
    checks.required(args, "--save", "MLM_MODEL_SAVE")
    smoke_generation.check(args)
    pruning_choice.check_parallel(args)
    source = find_source(args)
    # With --dry-run an earlier job may still have to make it.
    made = source.is_checkpoint and source.is_local
    if made and torch_dist.is_quantized(Path(source.location)):
        raise UsageError(
            f"--load {args.load}",
            "it holds a state of ModelOpt: it is quantized, or has a draft attached",
            "prune the checkpoint that convert.sh made; quantize or draft afterwards",
        )
    limits, config = pruning_choice.targets(args)
    pruning_choice.check_search(args, searching=bool(limits))
    if source.described is not None:
        parallel_check.check(source.architecture, arguments.parallel(args))
        if config is not None:
            allowed = pruning_choice.dimensions(args, source.architecture)
            pruning_space.check_export_config(config, allowed)
    kept = pruning_choice.cache(args, source)
    if kept is not None:
        kept.described()
    calibration_options.check(args)
    mmlu_options.check(args)
    outputs.check_folder(Path(args.save), overwrite=args.overwrite, needed=size_estimate(source, 2))


def prune(args: argparse.Namespace, session: Session) -> tuple[MegatronModule, dict[str, Any]]:
    """Load, rank, cut, save. Returns this rank's model and, on rank 0, the manifest.

    Raises:
        UsageError: if the sizes are not allowed, or no architecture meets the target.
    """
    from post_training.common.manifest import Manifest
    from post_training.models import builder as model_building
    from post_training.pruning import measure as pruning_measure
    from post_training.pruning import minitron
    from post_training.pruning import report as pruning_report
    from post_training.pruning import search as pruning_search

    limits, config = pruning_choice.targets(args)
    source = fetch_source(find_source(args), args)
    original = source.architecture
    allowed = pruning_choice.dimensions(args, original)
    memory = pruning_search.Memory(args.prune_memory_sequence_length, args.prune_memory_batch_size)
    transformer = model_building.transformer_config(original, loading.build_options(source, args))
    target: dict[str, int] | Search
    if config is None:
        target = pruning_search.Search(
            limits,
            args.prune_max_width_pruning,
            args.prune_max_depth_pruning,
            args.prune_top_k,
            pruning_choice.skipped(args),
            memory,
        )
        pruning_search.check_reachable(original, transformer, allowed, target)
    else:
        pruning_space.check_export_config(config, allowed)
        # Unchanged widths would be sorted for nothing.
        target = {name: value for name, value in config.items() if value != allowed[name].original}
    folder = loading.local_huggingface(source, args)
    measure = pruning_measure.Measure(args, session, source)
    model = loading.load(source, args, session, layer_spec="transformer_engine")
    whole = pruning_search.counted(model, pruning_search.size(original, transformer, memory))
    before = measure.of(model, original, whole)
    outcome = minitron.prune(
        model,
        target,
        pruning_choice.granularity(args, original),
        allowed=allowed,
        acceptable=pruning_search.acceptance(original, transformer, allowed, target),
        calibrate=measure.run,
        describe_calibration=measure.run.to_json,
        score=measure.score,
        cache=pruning_choice.cache(args, source),
        show_progress=session.show_progress,
    )
    architecture = pruning_space.pruned_architecture(original, outcome.config, outcome.kept_layers)
    for each in outcome.candidates:
        each |= pruning_search.size(original, transformer, memory, **each["config"]).to_json()
    if session.is_main and outcome.candidates:
        by = "MMLU accuracy" if args.mmlu_dataset else "log-likelihood"
        pruning_report.show_candidates(outcome.candidates, outcome.fitting, by)
    small = pruning_search.size(architecture, model.config, memory)
    after = measure.of(model, architecture, pruning_search.counted(model, small))
    content = torch_dist.save(
        model,
        Path(args.save),
        Manifest(
            "prune",
            architecture.to_json(),
            configuration=arguments.explicit(args),
            inputs=source.inputs(),
            metrics=pruning_report.metrics(
                outcome, before, after, measure.run.to_json() if outcome.calibrated else None
            ),
            started=session.started,
            peak_memory_bytes=session.peak_memory(),
            extra={"pruned_from": original.to_json(), **source.pruned_from()},
        ),
        write_huggingface=small_files(
            folder, architecture, outcome.kept_layers, python_files=args.trust_remote_code
        ),
    )
    if session.is_main:
        pruning_report.show(args, content or {}, outcome, before, after, memory)
    return model, content or {}


def small_files(
    source: Path, architecture: Architecture, kept_layers: list[int], *, python_files: bool
) -> Callable[[Path], None]:
    """Writes configuration, adapted to the pruned model, and tokenizer into a folder."""
    from post_training.checkpoints import huggingface
    from post_training.common import files
    from post_training.models import families

    def write(folder: Path) -> None:
        huggingface.copy_small_files(source, folder, python_files=python_files)
        config = huggingface.read_config(folder)
        shaped = families.with_shape(config, architecture.resolved(), kept_layers)
        files.write_json(folder / "config.json", shaped)

    return write


def main() -> None:
    args = arguments.parse_namespace("prune", add_arguments, check)
    from post_training.cli.stage import open_session

    with open_session(args) as session:
        model, _ = prune(args, session)
        smoke_generation.run(args, model, find_source(args))


if __name__ == "__main__":
    main()
