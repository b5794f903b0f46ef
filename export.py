"""Megatron checkpoint -> Hugging Face folder that vLLM, TensorRT-LLM or SGLang loads.

Inputs:  --load, a checkpoint of ours (quantized, pruned, drafted); --pretrained-model-name, a
         folder or hub name with configuration and tokenizer, unless the checkpoint carries them.
Outputs: --export-dir with safetensors, tokenizer, config.json and, for a quantized model,
         hf_quant_config.json; run.json beside them. The folder is read back by independent code and
         compared with the model before it gets its name. With --export-extra-modules the draft
         of a drafted checkpoint is written instead, as a folder of its own.

    MLM_MODEL_CKPT=/work/Qwen3-0.6B_quant bash export.sh Qwen/Qwen3-0.6B
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from post_training.checkpoints import loading, record
from post_training.checkpoints.source import Source, fetch_source, find_source, size_estimate
from post_training.cli.stage import Stage, run
from post_training.common import files, outputs, report
from post_training.common.errors import UsageError
from post_training.config import checks
from post_training.config.flags import flag, shows
from post_training.config.options import StageOptions
from post_training.drafts.eagle3.draft import require_exportable
from post_training.drafts.record import draft_of, require_draft
from post_training.export import target as export_target
from post_training.models import parallel_check
from post_training.quantization import format_table
from post_training.quantization.engines import registry as engines

if TYPE_CHECKING:
    from post_training.distributed.session import Session

logger = logging.getLogger("post_training")


@dataclass(frozen=True, kw_only=True)
class ExportOptions(StageOptions):
    export_dir: str | None = flag(
        metavar="FOLDER", help="where to write; must not exist or be empty"
    )
    pretrained_model_name: str | None = flag(
        metavar="FOLDER_OR_NAME",
        help="configuration and tokenizer, if the checkpoint carries none",
    )
    export_extra_modules: bool = flag(
        False, help="write the draft (EAGLE-3) of the checkpoint instead of the model"
    )
    max_shard_size: float = flag(
        5.0,
        metavar="GB",
        check=checks.positive,
        help="largest safetensors file, in 10^9 bytes (%(default)s)",
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
    """``options`` have in ``pretrained_model_path`` what --pretrained-model-name says too.

    ``target`` is the engine that the folder is for.
    """

    options: ExportOptions
    source: Source
    folder: Path
    target: str


def check(options: ExportOptions) -> Plan:
    folder = Path(checks.required("--export-dir", options.export_dir, "EXPORT_DIR"))
    sizes = options.parallel
    if sizes.tensor > 1 or sizes.expert > 1:
        raise UsageError(
            f"TP={sizes.tensor} EP={sizes.expert}",
            "ranks would write parts of tensors under whole names",
            "export at TP=1 EP=1, which export.sh chooses; PP may be larger",
        )
    named = options.pretrained_model_path or options.pretrained_model_name
    options = replace(options, pretrained_model_path=named)
    source = find_source(options)
    if source.described:
        parallel_check.check(source.described, sizes)
    target = export_target.choose(options.target, source)
    if options.export_extra_modules:
        require_draft(source, options)
        draft = draft_of(source)
        if draft is not None:
            require_exportable(draft.config, f"--load {options.load}")
        outputs.check_folder(folder, outputs.EXPORT, overwrite=options.overwrite)
    else:
        if not options.allow_unexportable:
            export_target.check(source, target)
        needed = size_estimate(source, 2)
        outputs.check_folder(folder, outputs.EXPORT, overwrite=options.overwrite, needed=needed)
    return Plan(options, source, folder, target)


def export(plan: Plan, session: Session) -> dict[str, Any]:
    """Write, read back, compare, publish. Returns the manifest.

    Raises:
        UsageError: if the format cannot be exported, or what was written is not the model.
    """
    from post_training.distributed.collectives import on_first_rank
    from post_training.export import eagle3_exporter, model_folder

    options = plan.options
    source = fetch_source(plan.source, options)
    model = loading.load(source, options, session)
    shard = int(options.max_shard_size * 10**9)
    where = (source, options, session, plan.folder)
    if options.export_extra_modules:
        metrics = eagle3_exporter.write(model, *where, max_shard_bytes=shard)
    else:
        metrics = model_folder.write(
            model,
            *where,
            max_shard_bytes=shard,
            target=plan.target,
            allow_unexportable=options.allow_unexportable,
        )
    extra = {"target": plan.target, **source.pruned_from()}
    manifest = record.of_run(options, session, source, metrics=metrics, extra=extra)

    def publish() -> dict[str, Any]:
        content = manifest.write(files.incomplete(plan.folder))
        files.publish(plan.folder)
        return content

    return on_first_rank(publish)


def show(plan: Plan, content: dict[str, Any], session: Session) -> None:
    metrics = content["metrics"]
    if plan.options.export_extra_modules:
        layers = metrics["auxiliary_layers"]
        draft = {"method": "eagle3", "model": str(plan.folder), "num_speculative_tokens": 3}
        next_step = f"vllm serve <exported target> --speculative-config '{json.dumps(draft)}'"
        rows = {
            "draft": f"EAGLE-3, {metrics['draft_vocab_size']:,} tokens",
            "auxiliary layers": f"outputs of {layers} from 0; vLLM counts "
            f"{[layer + 1 for layer in layers]}",
            "read back": f"{metrics['tensors_compared']} tensors equal the draft's",
        }
    else:
        next_step = f"vllm serve {plan.folder}"
        rows = {
            "format": metrics["quant_algo"] or "not quantized",
            "KV cache": metrics["kv_cache_quant_algo"] or "not quantized",
            "bits per weight": f"{metrics['bits_per_weight']:.2f}, scales included",
            "read back": f"{metrics['tensors_compared']} tensors equal the model's",
        }
    rows["folder"] = f"{plan.folder} ({report.size(plan.folder)})"
    report.summary("exported and verified", {**rows, **report.cost(content)}, next_step)
    if draft_of(plan.source) is not None and not plan.options.export_extra_modules:
        logger.info("the draft is exported by: export.sh --export-extra-modules")


STAGE = Stage("export", ExportOptions, check, export, show, outputs=("export_dir",))


def main() -> None:
    run(STAGE)


if __name__ == "__main__":
    main()
