"""Hugging Face -> Megatron checkpoint, or Megatron checkpoint -> one of another layout.

Inputs:  --pretrained-model-path, a Hugging Face folder or hub name with safetensors, or --load, a
         Megatron checkpoint (a quantized one too); the architecture comes from the conf's flags and
         must agree. --algorithm eagle3 attaches a draft, to be trained by eagle3.sh.
Outputs: --save, a Megatron-LM checkpoint (torch_dist) with run.json, that loads at any TP and PP;
         configuration and tokenizer travel along in its folder huggingface/.

    HF_MODEL_CKPT=/models/Qwen3-0.6B TP=2 bash convert.sh Qwen/Qwen3-0.6B
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from post_training.checkpoints import loading, model_folders, record, torch_dist
from post_training.checkpoints.huggingface import SmallFiles
from post_training.checkpoints.source import (
    Source,
    fetch_source,
    find_source,
    size_estimate,
)
from post_training.cli.stage import Stage, run
from post_training.common import outputs, report
from post_training.common.errors import UsageError
from post_training.config.checks import required
from post_training.config.flags import flag, group, spelled
from post_training.config.options import StageOptions
from post_training.distributed.session import Session
from post_training.drafts import options as draft_options
from post_training.drafts import registry
from post_training.drafts.eagle3.draft import Draft
from post_training.drafts.options import DraftOptions
from post_training.drafts.record import draft_of
from post_training.models import parallel_check
from post_training.models.architecture import Architecture
from post_training.models.builder import count_parameters


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(StageOptions):
    extra_model_path: Path | None = flag(
        metavar="FOLDER",
        help="take tokenizer and configuration files from here instead of the model's folder; a "
        "Megatron checkpoint with a draft is the same as --draft-model-path",
    )
    algorithm: str = flag(
        "None",
        choices=(*registry.ALGORITHMS, "None"),
        help="what to attach: a draft, by its algorithm, or nothing (%(default)s)",
    )
    export_offline_model: bool = flag(
        False,
        help="leave out the target's layers: for training from features only (--algorithm eagle3)",
    )
    draft_model_path: str | None = flag(
        metavar="DIR",
        help="take the draft's weights from this checkpoint, e.g. one trained without the "
        "target's layers (--algorithm eagle3)",
    )
    draft: DraftOptions = group(DraftOptions)


@dataclass(frozen=True)
class Plan:
    """``draft`` is the draft to attach, if any."""

    options: ConvertOptions
    source: Source
    save: Path
    draft: Draft | None


def check(options: ConvertOptions) -> Plan:
    save = Path(required("--save", options.save, "MLM_MODEL_SAVE"))
    extra = options.extra_model_path
    if extra and options.algorithm != "None" and draft_options.holds_draft(extra):
        options = replace(options, draft_model_path=str(extra), extra_model_path=None)
        options = options.noting("--extra-model-path is taken as --draft-model-path")
    source = find_source(options)
    _check_draft_flags(options, source)
    draft = None
    if source.described:
        draft = plan_draft(options, source.described)
        parallel_check.check(source.described, options.parallel)
    if options.extra_model_path:
        model_folders.model_config(options.extra_model_path, "--extra-model-path")
    outputs.check_folder(save, overwrite=options.overwrite, needed=size_estimate(source, options))
    return Plan(options, source, save, draft)


def _check_draft_flags(options: ConvertOptions, source: Source) -> None:
    """Everything about the draft that can be known before its target is described."""
    if options.algorithm == "None":
        for name in ("export_offline_model", "draft_model_path", *draft_options.NAMES):
            if name in options.given:
                raise UsageError(
                    spelled(name),
                    "it is about a draft, and none is attached",
                    "give --algorithm eagle3 too",
                )
        return
    existing = draft_of(source)
    if existing is not None:
        raise UsageError(
            f"--load {options.load}",
            f"it has a draft already, trained for {existing.trained} iterations",
            "train it with eagle3.sh, or attach a new one to the checkpoint without a draft",
        )
    if options.export_offline_model and options.parallel.pipeline > 1:
        raise UsageError(
            f"--export-offline-model PP={options.parallel.pipeline}",
            "without its layers the model has one pipeline stage",
            "PP=1",
        )
    if options.draft_model_path:
        draft_options.trained(options.draft_model_path, options, source.described)


def plan_draft(options: ConvertOptions, target: Architecture) -> Draft | None:
    """The draft to attach to ``target``: the one of ``--draft-model-path``, or a new one."""
    if options.algorithm == "None":
        return None
    offline = options.export_offline_model
    if options.draft_model_path:
        return draft_options.trained(options.draft_model_path, options, target, offline=offline)
    return draft_options.plan(
        options.draft, options, target, algorithm=options.algorithm, offline=offline
    )


def convert(plan: Plan, session: Session) -> dict[str, Any]:
    """Load the source at the requested layout and save it. Returns the manifest."""
    options = plan.options
    source = fetch_source(plan.source, options)
    folder = options.extra_model_path or loading.local_huggingface(source, options)
    model = loading.load(source, options, session)
    parameters = count_parameters(model)
    metrics = {"parameters": parameters, "dtype": options.precision}
    extra = source.carried()
    draft = plan.draft
    if draft is not None:
        algorithm = registry.find(draft.algorithm)
        algorithm.attach(model, draft, options.seed)
        if options.draft_model_path:
            trained = Path(options.draft_model_path)
            with loading.verified(trained, options):
                torch_dist.load(model, trained, only=algorithm.module)
        extra["draft"] = draft.to_json()
        metrics["draft_parameters"] = count_parameters(model) - parameters
        if draft.offline:
            model.decoder.layers = type(model.decoder.layers)()
    manifest = record.of_run(options, session, source, metrics=metrics, extra=extra)
    weights = None if source.is_checkpoint else Path(source.location)
    small_files = SmallFiles(folder, options.trust_remote_code, weights=weights)
    return torch_dist.save(model, plan.save, manifest, small_files=small_files)


def show(plan: Plan, content: dict[str, Any], session: Session) -> None:
    drafted = content["metrics"].get("draft_parameters")
    next_step = f"MLM_MODEL_CKPT={plan.save} bash quantize.sh <conf> FP8_DEFAULT_CFG"
    if drafted:
        next_step = f"MLM_MODEL_SAVE={plan.save} bash eagle3.sh <conf>"
    report.summary(
        "converted",
        {
            "parameters": f"{content['metrics']['parameters']:,}",
            **({"draft": f"{drafted:,} parameters, to be trained"} if drafted else {}),
            "checkpoint": f"{plan.save} ({report.size(plan.save)})",
            "layout saved": f"{session.parallel}, loads at any",
            **report.cost(content),
        },
        next_step=next_step,
    )


STAGE = Stage("convert", ConvertOptions, check, convert, show, outputs=("save",))


def main() -> None:
    run(STAGE)


if __name__ == "__main__":
    main()
