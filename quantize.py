"""Quantize a model and calibrate it; save a Megatron checkpoint with the scales.

Inputs:  --load, a Megatron checkpoint, or --pretrained-model-path, a Hugging Face folder or hub
         name; --export-quant-cfg, a format (docs/formats.md has the table) or auto, or --recipe, a
         file; --calib-dataset-path-or-name, text or conversations to calibrate on.
Outputs: --save, a checkpoint whose weights are unchanged (but for GPTQ, SmoothQuant and AWQ) and
         whose quantizers have their scales (with --compress the weights are packed), with run.json.

    MLM_MODEL_CKPT=/work/Qwen3-0.6B_mlm bash quantize.sh Qwen/Qwen3-0.6B FP8_DEFAULT_CFG
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from post_training.checkpoints import loading, record, torch_dist
from post_training.checkpoints.huggingface import SmallFiles
from post_training.checkpoints.source import Source, fetch_source, find_source, size_estimate
from post_training.cli.stage import Stage, run
from post_training.common import outputs, report
from post_training.common.errors import UsageError
from post_training.config import checks, model_description
from post_training.data import options as calibration_options
from post_training.inference import smoke_generation
from post_training.models import parallel_check
from post_training.models.families import registry as families
from post_training.quantization import expert_options, expert_table
from post_training.quantization import options as quantization_options
from post_training.quantization.engines import registry as engines
from post_training.quantization.formats.exportable import Verdict
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
    """This rank's model and what was done to it; ``content`` is that of ``run.json``."""

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
    options = quantization_options.noting(options, choice)
    if source.described is not None:
        options = expert_options.noting(options, source.described)
    model_description.check_tokenizer(options, own=True)
    calibration_options.check(options.calibration)
    outputs.check_folder(save, overwrite=options.overwrite, needed=size_estimate(source, options))
    return Plan(options, source, save, choice)


def quantize(plan: Plan, session: Session) -> Quantized:
    """Load, quantize, check, save.

    Raises:
        UsageError: if the format cannot be exported, or a weight that it matches has no scale.
    """
    from post_training.quantization import calibration, configuration, ptq

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
    reason = families.family_of(source.architecture).not_quantized
    if reason:
        result = replace(result, found=Verdict(reason=reason))
    metrics = {
        "calibration": data.to_json(),
        "coverage": result.reached.to_json(),
        "ranges": result.ranges,
    }
    if result.search:
        metrics["search"] = result.search
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
    manifest = record.of_run(options, session, source, metrics=metrics, extra=extra)
    content = torch_dist.save(model, plan.save, manifest, small_files=small_files)
    smoke_generation.run(options.smoke, model, tokenizer, plan.save)
    return Quantized(model, result, content)


def show(plan: Plan, quantized: Quantized, session: Session) -> None:
    from post_training.quantization import gptq

    options, content = plan.options, quantized.content
    reached, found = quantized.result.reached, quantized.result.found
    used = content["metrics"]["calibration"]
    of_quantized, of_all = reached.bits_per_weight(32 if options.precision == "fp32" else 16)
    speed = f", {used['tokens_per_second']:,.0f} tokens/s" if used["tokens_computed"] else ""
    readers, gpus = engines.describe(found.quant_algo)
    exported = f"{found.quant_algo}: {readers}; {gpus}" if found.exportable else "no engine"
    kv = found.kv_cache_quant_algo
    routed = {"experts": expert_table.describe(used)} if used["expert_tokens"] else {}
    expert_table.show(used)
    report.summary(
        f"quantized: {content['quantization']['format']}",
        {
            "quantizers": ", ".join(f"{n} {kind}" for kind, n in reached.quantizers.items()),
            "quantized": reached.describe_quantized(),
            "left out": reached.describe_left_out(),
            "bits per weight": f"{of_quantized:.2f} where quantized, {of_all:.2f} over all, "
            "scales included",
            "calibrated on": f"{used['sequences']:,} sequences of {used['sequence_length']:,}, "
            f"{used['tokens']:,} tokens{speed}",
            **routed,
            **({"gptq": gptq.describe(used["gptq"])} if "gptq" in used else {}),
            "exports as": exported + (f"; keys and values {kv}" if kv else ""),
            "checkpoint": f"{plan.save} ({report.size(plan.save)})",
            "layout saved": f"{options.parallel}, loads at any",
            **report.cost(content),
        },
        next_step=f"MLM_MODEL_CKPT={plan.save} bash mmlu.sh <conf>, then bash export.sh <conf>",
    )


STAGE = Stage("quantize", QuantizeOptions, check, quantize, show, outputs=("save",))


def main() -> None:
    run(STAGE)


if __name__ == "__main__":
    main()
