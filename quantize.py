"""Quantize a model and calibrate it; save a Megatron checkpoint with the scales, or export it.

Inputs:  --load, a Megatron checkpoint, or --pretrained-model-path, a Hugging Face folder or hub
         name; --export-quant-cfg, a format (docs/formats.md has the table) or auto, or --recipe, a
         file; --calib-dataset-path-or-name, text or conversations to calibrate on.
Outputs: --save, a checkpoint whose weights are unchanged (but for GPTQ, SmoothQuant and AWQ) and
         whose quantizers have their scales (with --compress the weights are packed), with run.json.
         --export-dir, the folder that export.py would make of it; --save may then be left out.

    MLM_MODEL_CKPT=/work/Qwen3-0.6B_mlm bash quantize.sh Qwen/Qwen3-0.6B FP8_DEFAULT_CFG
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from post_training.checkpoints import loading, record, torch_dist
from post_training.checkpoints.huggingface import SmallFiles
from post_training.checkpoints.source import Source, fetch_source, find_source, size_estimate
from post_training.cli.stage import Stage, run
from post_training.common import outputs, report
from post_training.common.manifest import describe_input
from post_training.config import checks, model_description
from post_training.data import options as calibration_options
from post_training.export import exporting
from post_training.export import summary as export_summary
from post_training.export.exporting import ExportPlan
from post_training.inference import smoke_generation
from post_training.models import parallel_check
from post_training.models.families import registry as families
from post_training.quantization import (
    expert_options,
    expert_table,
    layerwise_checks,
    model_checks,
    summary,
)
from post_training.quantization import options as quantization_options
from post_training.quantization.formats.exportable import Verdict
from post_training.quantization.options import Choice, QuantizeOptions

if TYPE_CHECKING:
    from megatron.core.transformer import MegatronModule

    from post_training.distributed.session import Session
    from post_training.quantization.ptq import PtqResult


@dataclass(frozen=True)
class Plan:
    """``choice`` is the format, the recipe, or ``auto``; at least one output is not None."""

    options: QuantizeOptions
    source: Source
    save: Path | None
    export: ExportPlan | None
    choice: Choice


@dataclass(frozen=True)
class Quantized:
    """This rank's model (None: never whole) and what was done; ``content`` is of ``run.json``."""

    model: MegatronModule | None
    result: PtqResult
    content: Mapping[str, Any]


def check(options: QuantizeOptions) -> Plan:
    save = Path(options.save) if options.save else None
    export = _planned_export(options)
    if export is None and not options.layerwise:
        checks.required("--save", options.save, "MLM_MODEL_SAVE (EXPORT_DIR for an export)")
    checks.no_context_parallelism(options.parallel.context)
    source = find_source(options)
    model_checks.check_state(source, f"--load {options.load}")
    if source.described is not None:
        parallel_check.check(source.described, options.parallel)
    choice = quantization_options.chosen(options)
    quantization_options.check(options, choice, source.described)
    if options.layerwise:
        layerwise_checks.check(options, choice)
        options = layerwise_checks.noting(options)
    options = quantization_options.noting(options, choice)
    if source.described is not None:
        options = expert_options.noting(options, source.described)
    model_description.check_tokenizer(options, own=True)
    calibration_options.check(options.calibration)
    needed = size_estimate(source, options)
    check_output = partial(outputs.check_folder, overwrite=options.overwrite, needed=needed)
    if save is not None:
        check_output(save)
    if export is not None:
        check_output(export.folder, outputs.EXPORT)
    return Plan(options, source, save, export, choice)


def _planned_export(options: QuantizeOptions) -> ExportPlan | None:
    """The export that is asked for; UsageError for a layout that cannot write it."""
    if not options.export_dir:
        return None
    remedy = "or save a checkpoint (MLM_MODEL_SAVE, without EXPORT_DIR) and run export.sh"
    exporting.check_layout(options.parallel, f"TP=1 EP=1 (PP may be larger), {remedy}")
    folder, allowed = Path(options.export_dir), options.allow_unexportable
    return ExportPlan(folder, options.target, options.shard_bytes, allow_unexportable=allowed)


def quantize(plan: Plan, session: Session) -> Quantized:
    """Load, quantize, check, save, export.

    Raises:
        UsageError: if the format cannot be exported, or a weight that it matches has no scale.
    """
    from post_training.export import layerwise
    from post_training.inference.batching import Batching
    from post_training.quantization import calibration, configuration, layer_calibration, ptq

    options = plan.options
    source = fetch_source(plan.source, options)
    small_files = SmallFiles(loading.local_huggingface(source, options), options.trust_remote_code)
    tokenizer = loading.tokenizer(source, options)
    samples = calibration_options.load(
        options.calibration, tokenizer, source.architecture, options.seed
    )
    batching = Batching(options.calibration.calib_batch_size, "--calib-batch-size")
    kind = layer_calibration.LayerCalibration if options.layerwise else calibration.Calibration
    data = kind(samples, batching, session.show_progress)
    exported: Mapping[str, Any] = {}
    model = None
    if isinstance(data, layer_calibration.LayerCalibration):
        result, exported = layerwise.quantize(plan, source, data, session)
    else:
        model = loading.load(source, options, session)
        result = ptq.quantize(model, options, plan.choice, data)
    reason = families.family_of(source.architecture).not_quantized
    if reason:
        result = replace(result, found=Verdict(reason=reason))
    metrics = {"calibration": data.to_json(), **result.metrics()}
    # What later stages read.
    described = {
        "format": quantization_options.name_of(plan.choice),
        "weight_only": options.weight_only,
        "compressed": options.packed,
        "left_out": list(options.left_out),
        "target": options.target,
        "exportable": result.found.exportable,
        **asdict(result.found),
        "configuration": configuration.as_json(result.config),
    }
    extra = {"quantization": described, **source.pruned_from()}
    content: Mapping[str, Any] = {}
    if plan.save is not None and model is not None:
        manifest = record.of_run(options, session, source, metrics=metrics, extra=extra)
        content = torch_dist.save(model, plan.save, manifest, small_files=small_files)
    if plan.export is not None:
        if model is not None:
            exported = exporting.write(plan.export, model, source, options, session)
        metrics |= exported
        made_from = source.inputs()
        if plan.save is not None:
            made_from.append(describe_input("checkpoint", plan.save))
        manifest = record.of_run(
            options, session, source, inputs=made_from, metrics=metrics, extra=extra
        )
        content = exporting.publish(plan.export, manifest, source, options)
    if model is not None:
        smoke_generation.run(options.smoke, model, tokenizer, f"{plan.save or options.export_dir}")
    return Quantized(model, result, content)


def show(plan: Plan, quantized: Quantized, session: Session) -> None:
    options, content = plan.options, quantized.content
    rows = summary.rows(options, quantized.result, content)
    next_step = f"MLM_MODEL_CKPT={plan.save} bash mmlu.sh <conf>, then bash export.sh <conf>"
    if plan.save is not None:
        rows["checkpoint"] = f"{plan.save} ({report.size(plan.save)})"
        rows["layout saved"] = f"{options.parallel}, loads at any"
    if plan.export is not None:
        written = export_summary.rows(plan.export, content)
        rows |= {"read back": written["read back"], "exported": written["folder"]}
        next_step = export_summary.serve(plan.export, content)
    expert_table.show(content["metrics"]["calibration"])
    title = f"quantized: {content['quantization']['format']}"
    report.summary(title, {**rows, **report.cost(content)}, next_step)


STAGE = Stage("quantize", QuantizeOptions, check, quantize, show, outputs=("save", "export_dir"))


def main() -> None:
    run(STAGE)


if __name__ == "__main__":
    main()
