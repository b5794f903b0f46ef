"""Megatron checkpoint -> Hugging Face folder that vLLM, TensorRT-LLM or SGLang loads.

Inputs:  --load, a checkpoint of ours (quantized, pruned, drafted); --pretrained-model-name, a
         folder or hub name with configuration and tokenizer, unless the checkpoint carries them.
Outputs: --export-dir with safetensors, tokenizer, config.json and, for a quantized model,
         hf_quant_config.json; run.json and a model card (README.md) beside them. The draft of a
         drafted checkpoint is written to its subfolder draft/; with --export-extra-modules, or from
         a checkpoint without the target's layers, alone. The folder is read back by other code and
         compared with the model before it gets its name.

    MLM_MODEL_CKPT=/work/Qwen3-0.6B_quant bash export.sh Qwen/Qwen3-0.6B
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from post_training.checkpoints import loading, record
from post_training.checkpoints.source import Source, fetch_source, find_source, size_estimate
from post_training.cli.stage import Stage, run
from post_training.common import outputs
from post_training.config import checks
from post_training.config.export_folder import FolderOptions
from post_training.config.flags import flag, shows
from post_training.config.options import StageOptions
from post_training.drafts.record import is_exported_alone
from post_training.export import exporting, summary
from post_training.export import target as export_target
from post_training.export.exporting import ExportPlan
from post_training.models import parallel_check
from post_training.quantization import format_table
from post_training.quantization.engines import registry as engines

if TYPE_CHECKING:
    from post_training.distributed.session import Session


@dataclass(frozen=True, kw_only=True)
class ExportOptions(FolderOptions, StageOptions):
    pretrained_model_name: str | None = flag(
        metavar="FOLDER_OR_NAME",
        help="configuration and tokenizer, if the checkpoint carries none",
    )
    export_extra_modules: bool = flag(
        False, help="write the draft (EAGLE-3) of the checkpoint alone, without the model"
    )
    export_offline_model: bool = flag(
        False, help="the checkpoint has a draft and not its target's layers; the draft is written"
    )
    export_vllm_fq: bool = flag(
        False, help="rounded weights in 16 bits, for ModelOpt's vllm_serve_fakequant.py"
    )
    target: str | None = flag(
        choices=tuple(engines.TARGETS),
        help=f"engine that is to read it (the one that quantize was told, else {engines.DEFAULT})",
    )
    list_formats: bool = flag(
        False,
        nargs=0,
        action=shows(format_table.show),
        help="show formats, engines and GPUs, and exit",
    )
    allow_unexportable: bool = flag(
        False, help="write the folder although the engine does not read this format correctly"
    )


@dataclass(frozen=True)
class Plan:
    """``options`` have in ``pretrained_model_path`` what --pretrained-model-name says too."""

    options: ExportOptions
    source: Source
    export: ExportPlan


def check(options: ExportOptions) -> Plan:
    folder = Path(checks.required("--export-dir", options.export_dir, "EXPORT_DIR"))
    sizes = options.parallel
    exporting.check_layout(sizes, "export at TP=1 EP=1, which export.sh chooses; PP may be larger")
    named = options.pretrained_model_path or options.pretrained_model_name
    options = replace(options, pretrained_model_path=named)
    source = find_source(options)
    if source.described:
        parallel_check.check(source.described, sizes)
    target = export_target.choose(options.target, source)
    alone = is_exported_alone(
        source,
        options,
        asked=options.export_extra_modules,
        offline=options.export_offline_model,
    )
    if alone:
        outputs.check_folder(folder, outputs.EXPORT, overwrite=options.overwrite)
    else:
        if not (options.export_vllm_fq or options.allow_unexportable):
            export_target.check(source, target)
        needed = size_estimate(source, options)
        outputs.check_folder(folder, outputs.EXPORT, overwrite=options.overwrite, needed=needed)
    plan = ExportPlan(
        folder,
        target,
        options.shard_bytes,
        simulated=options.export_vllm_fq,
        allow_unexportable=options.allow_unexportable,
    )
    return Plan(options, source, exporting.with_draft(plan, source, alone=alone))


def export(plan: Plan, session: Session) -> dict[str, Any]:
    """Write, read back, compare, publish. Returns the manifest.

    Raises:
        UsageError: if the format cannot be exported, or what was written is not the model.
    """
    options = plan.options
    source = fetch_source(plan.source, options)
    model = loading.load(source, options, session)
    metrics = exporting.write(plan.export, model, source, options, session)
    manifest = record.of_run(options, session, source, metrics=metrics, extra=source.pruned_from())
    return exporting.publish(plan.export, manifest, source, options)


def show(plan: Plan, content: dict[str, Any], session: Session) -> None:
    summary.show(plan.export, content)


STAGE = Stage("export", ExportOptions, check, export, show, outputs=("export_dir",))


def main() -> None:
    run(STAGE)


if __name__ == "__main__":
    main()
