"""Quantize a model and calibrate it; save a Megatron checkpoint with the scales.

Inputs:  --load, a Megatron checkpoint, or --pretrained-model-path, a Hugging Face folder or hub
         name; --export-quant-cfg, a format (docs/formats.md has the table) or auto, or --recipe, a
         file; --calib-dataset-path-or-name, text or conversations to calibrate on.
Outputs: --save, a checkpoint whose weights are unchanged and whose quantizers have their scales
         (with --compress the weights are packed), with run.json.

    MLM_MODEL_CKPT=/work/Qwen3-0.6B_mlm bash quantize.sh Qwen/Qwen3-0.6B FP8_DEFAULT_CFG
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from post_training.checkpoints import loading, record, torch_dist
from post_training.checkpoints.huggingface import SmallFiles
from post_training.checkpoints.source import Source, fetch_source, find_source, size_estimate
from post_training.cli.stage import Stage, run
from post_training.common import outputs
from post_training.common.errors import UsageError
from post_training.config import checks
from post_training.data import options as calibration_options
from post_training.inference import smoke_generation
from post_training.models import parallel_check, tokenizer_files
from post_training.quantization import options as quantization_options
from post_training.quantization.options import Choice, QuantizeOptions

if TYPE_CHECKING:
    from megatron.core.transformer import MegatronModule

    from post_training.distributed.session import Session
    from post_training.quantization.ptq import PtqResult


@dataclass(frozen=True)
class Plan:
    """``choice`` is the format, the recipe, or ``auto``."""

    options: QuantizeOptions
    source: Source
    save: Path
    choice: Choice


@dataclass(frozen=True)
class Quantized:
    """This rank's model and what was done to it; ``content`` is that of ``run.json``, on rank 0."""

    model: MegatronModule
    result: PtqResult
    content: Mapping[str, Any]


def check(options: QuantizeOptions) -> Plan:
    save = Path(checks.required("--save", options.save, "MLM_MODEL_SAVE"))
    checks.no_context_parallelism(options.parallel.context)
    source = find_source(options)
    quantized = (source.manifest or {}).get("quantization")
    if quantized:
        raise UsageError(
            f"--load {options.load}",
            f"it is already quantized: {quantized.get('format')}",
            "quantize the checkpoint that convert.sh made",
        )
    if source.described is not None:
        parallel_check.check(source.described, options.parallel)
    choice = quantization_options.chosen(options)
    quantization_options.check(options, choice, source.described)
    if options.tokenizer_model:
        tokenizer_files.check(options.tokenizer_model)
    calibration_options.check(options.calibration)
    outputs.check_folder(save, overwrite=options.overwrite, needed=size_estimate(source, 2))
    return Plan(options, source, save, choice)


def quantize(plan: Plan, session: Session) -> Quantized:
    """Load, quantize, check, save.

    Raises:
        UsageError: if the format cannot be exported, or a weight that it matches has no scale.
    """
    from post_training.quantization import calibration, ptq, report

    options = plan.options
    source = fetch_source(plan.source, options)
    small_files = SmallFiles(loading.local_huggingface(source, options), options.trust_remote_code)
    tokenizer = loading.tokenizer(source, options)
    samples = calibration_options.load(
        options.calibration, tokenizer, source.architecture, options.seed
    )
    model = loading.load(source, options, session)
    data = calibration.Calibration(
        samples, options.calibration.calib_batch_size, session.show_progress
    )
    result = ptq.quantize(model, options, plan.choice, data)
    described = report.described(options, plan.choice, result)
    manifest = record.of_run(
        options,
        session,
        source,
        metrics=report.metrics(data, result),
        extra={"quantization": described, **source.pruned_from()},
    )
    content = torch_dist.save(model, plan.save, manifest, small_files=small_files)
    smoke_generation.run(options.smoke, model, tokenizer, plan.save)
    return Quantized(model, result, content or {})


def show(plan: Plan, quantized: Quantized, session: Session) -> None:
    from post_training.quantization import report

    report.show(plan.options, plan.save, quantized.content, quantized.result)


STAGE = Stage("quantize", QuantizeOptions, check, quantize, show)


def main() -> None:
    run(STAGE)


if __name__ == "__main__":
    main()
