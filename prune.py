"""Prune a model's widths and depth (Minitron); save a smaller Megatron checkpoint.

Inputs:  --load, a Megatron checkpoint, or --pretrained-model-path, a Hugging Face folder or hub
         name; --prune-export-config, the new sizes, or --prune-target-params or
         --prune-target-memory, limits for a search; --calib-dataset, text to rank channels by;
         --mmlu-dataset, to score the model before and after, and candidates, on MMLU.
Outputs: --save, a checkpoint of the smaller model, with run.json. It carries its architecture, so
         later stages take the conf of the original. It needs distillation (distill.sh) before use.

    MLM_MODEL_CKPT=/work/Qwen3-8B_mlm bash prune.sh Qwen/Qwen3-8B --prune-target-params 6e9
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from post_training.checkpoints import huggingface, loading, record, torch_dist
from post_training.checkpoints.huggingface import SmallFiles
from post_training.checkpoints.source import Source, fetch_source, find_source, size_estimate
from post_training.cli.stage import Stage, run
from post_training.common import outputs
from post_training.common.errors import UsageError
from post_training.config import checks
from post_training.data import options as calibration_options
from post_training.evaluation import options as mmlu_options
from post_training.evaluation.mmlu_data import Benchmark
from post_training.inference import smoke_generation
from post_training.models import builder, parallel_check
from post_training.models.architecture import Architecture
from post_training.models.families import registry as families
from post_training.pruning import options as pruning_options
from post_training.pruning import report
from post_training.pruning.options import PruneOptions, SizeSearch
from post_training.pruning.score_cache import ScoreCache
from post_training.pruning.space import PruningSpace, check_sizes, pruned_architecture

if TYPE_CHECKING:
    from megatron.core.transformer import MegatronModule

    from post_training.distributed.session import Session


@dataclass(frozen=True)
class Plan:
    """What to prune, to which sizes.

    Attributes:
        target: sizes by name, or a search.
        space: None until a hub name's configuration is there.
        cache: None without a folder for it, and for a hub name.
        benchmark: questions that are on this machine.
    """

    options: PruneOptions
    source: Source
    save: Path
    target: Mapping[str, Any] | SizeSearch
    space: PruningSpace | None
    cache: ScoreCache | None
    benchmark: Benchmark | None


@dataclass(frozen=True)
class Pruned:
    """This rank's model, the original's architecture; ``content`` is of run.json."""

    model: MegatronModule
    original: Architecture
    content: Mapping[str, Any]


def check(options: PruneOptions) -> Plan:
    save = Path(checks.required("--save", options.save, "MLM_MODEL_SAVE"))
    pruning_options.check_parallel(options)
    source = find_source(options)
    # With --dry-run an earlier job may still have to make it.
    made = source.is_checkpoint and source.is_local
    if made and torch_dist.is_quantized(Path(source.location)):
        raise UsageError(
            f"--load {options.load}",
            "it holds a state of ModelOpt: it is quantized, or has a draft attached",
            "prune the checkpoint that convert.sh made; quantize or draft afterwards",
        )
    target, space, cache = pruning_options.target(options), None, None
    if source.described is not None:
        parallel_check.check(source.described, options.parallel)
        space = pruning_options.space(options, source.described)
        if not isinstance(target, SizeSearch):
            check_sizes(target, space.dimensions)
        # Scores are of a revision of a hub name, which is known with its weights.
        cache = pruning_options.cache(options, source) if source.is_local else None
        if cache is not None:
            cache.described()
    calibration_options.check(options.calibration)
    benchmark = mmlu_options.load_local(options.mmlu)
    outputs.check_folder(save, overwrite=options.overwrite, needed=size_estimate(source, options))
    return Plan(options, source, save, target, space, cache, benchmark)


def prune(plan: Plan, session: Session) -> Pruned:
    """Load, rank, cut, save.

    Raises:
        UsageError: if the sizes are not allowed, or no architecture meets the target.
    """
    from post_training.pruning import minitron, search
    from post_training.pruning.measure import Scorer

    options, target = plan.options, plan.target
    source = fetch_source(plan.source, options)
    original = source.architecture
    space = plan.space
    assert space is not None  # None with --dry-run alone
    transformer = builder.transformer_config(original, loading.build_options(source, options))
    if isinstance(target, SizeSearch):
        search.check_reachable(original, transformer, space.dimensions, target)
    else:
        target = check_sizes(target, space.dimensions)
    folder = loading.local_huggingface(source, options)
    scorer = Scorer(options, session, source, plan.benchmark)
    model = loading.load(source, options, session, layer_spec="transformer_engine")
    whole = search.size(original, transformer, options.memory)
    before = {**asdict(search.counted(model, whole)), **scorer.scores(model)}
    result = minitron.prune(
        model,
        target,
        space,
        acceptable=search.acceptance(original, transformer, space.dimensions, target),
        calibrate=scorer.calibration,
        describe_calibration=scorer.calibration.to_json,
        score=scorer.score,
        cache=plan.cache or pruning_options.cache(options, source),
        show_progress=session.show_progress,
    )
    architecture = pruned_architecture(original, result.config, result.kept_layers)
    small = search.size(architecture, model.config, options.memory)
    after = {**asdict(search.counted(model, small)), **scorer.scores(model)}
    sizes = [
        search.size(original, transformer, options.memory, **each.ss_config)
        for each in result.candidates
    ]
    manifest = record.of_run(
        options,
        session,
        source,
        architecture=architecture.to_json(),
        metrics=report.metrics(result, before, after, sizes, scorer.calibration.to_json()),
        extra={"pruned_from": original.to_json(), **source.pruned_from()},
    )
    config = families.with_shape(
        huggingface.read_config(folder), architecture.resolved(), result.kept_layers
    )
    small_files = SmallFiles(folder, options.trust_remote_code, config)
    content = torch_dist.save(model, plan.save, manifest, small_files=small_files)
    smoke_generation.run(options.smoke, model, scorer.tokenizer, str(plan.save))
    return Pruned(model, original, content)


def show(plan: Plan, result: Pruned, session: Session) -> None:
    report.show(plan.options, plan.save, result.content, result.original)


STAGE = Stage("prune", PruneOptions, check, prune, show, outputs=("save",))


def main() -> None:
    run(STAGE)


if __name__ == "__main__":
    main()
