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

import argparse
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from post_training.checkpoints import loading
from post_training.checkpoints.source import fetch_source, find_source, size_estimate
from post_training.common import files, outputs
from post_training.common.errors import UsageError
from post_training.config import arguments, checks
from post_training.drafts.record import draft_of, require_draft
from post_training.export import eagle3_exporter
from post_training.models import parallel_check

if TYPE_CHECKING:
    import torch
    from megatron.core.transformer import MegatronModule

    from post_training.checkpoints.source import Source
    from post_training.distributed.session import Session
    from post_training.export.exporter import Exporter

logger = logging.getLogger("post_training")

_GIGABYTE = 10**9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("export")
    add = group.add_argument
    add("--export-dir", metavar="FOLDER", help="where to write; must not exist or be empty")
    add(
        "--pretrained-model-name",
        metavar="FOLDER_OR_NAME",
        help="configuration and tokenizer, if the checkpoint carries none",
    )
    add(
        "--export-extra-modules",
        action="store_true",
        help="write the draft (EAGLE-3) of the checkpoint instead of the model",
    )
    add(
        "--max-shard-size",
        type=float,
        default=5.0,
        metavar="GB",
        help="largest safetensors file, in 10^9 bytes (5)",
    )
    add(
        "--allow-unexportable",
        action="store_true",
        help="write the folder although no engine reads this format correctly",
    )


def check(args: argparse.Namespace) -> None:
    checks.required(args, "--export-dir", "EXPORT_DIR")
    if args.max_shard_size <= 0:
        raise UsageError(
            f"--max-shard-size {args.max_shard_size}", "a file needs room", "give a size in GB"
        )
    if args.tensor_model_parallel_size > 1 or args.expert_model_parallel_size > 1:
        raise UsageError(
            f"TP={args.tensor_model_parallel_size} EP={args.expert_model_parallel_size}",
            "ranks would write parts of tensors under whole names",
            "export at TP=1 EP=1, which export.sh chooses; PP may be larger",
        )
    source = _source(args)
    if source.described:
        parallel_check.check(source.described, arguments.parallel(args))
    if args.export_extra_modules:
        require_draft(source, args)
        if draft_of(source) is not None:
            eagle3_exporter.require_exportable(draft_of(source).config, f"--load {args.load}")
        outputs.check_folder(Path(args.export_dir), overwrite=args.overwrite)
        return
    recorded = (source.manifest or {}).get("quantization") or {}
    if recorded.get("exportable") is False and not args.allow_unexportable:
        raise UsageError(
            f"--load {args.load}",
            f"it is quantized as {recorded.get('format')}, which cannot be exported: "
            f"{recorded.get('reason')}",
            "quantize the model in an exportable format (README.md has the table)",
        )
    outputs.check_folder(
        Path(args.export_dir), overwrite=args.overwrite, needed=size_estimate(source, 2)
    )


def export(args: argparse.Namespace, session: Session) -> dict[str, Any]:
    """Write, read back, compare, publish. Returns the manifest on rank 0.

    Raises:
        UsageError: if the format cannot be exported, or what was written is not the model.
    """
    import torch

    from post_training.common.manifest import Manifest

    source = fetch_source(_source(args), args)
    model = loading.load(source, args, session)
    target = Path(args.export_dir)
    write = write_draft if args.export_extra_modules else write_model
    metrics = write(args, session, model, source)
    content = None
    peak_memory = session.peak_memory()
    if session.is_main:
        content = Manifest(
            "export",
            source.architecture.to_json(),
            configuration=arguments.explicit(args),
            inputs=source.inputs(),
            metrics=metrics,
            started=session.started,
            peak_memory_bytes=peak_memory,
            extra=source.pruned_from(),
        ).write(files.incomplete(target))
        files.publish(target)
    torch.distributed.barrier()
    return content or {}


def _begin(args: argparse.Namespace, session: Session) -> Path:
    """The empty folder that is written into; a collective call."""
    import torch

    target = Path(args.export_dir)
    if session.is_main:
        files.begin(target)
    torch.distributed.barrier()
    return files.incomplete(target)


def write_model(
    args: argparse.Namespace, session: Session, model: MegatronModule, source: Source
) -> dict[str, Any]:
    """Write the model into the working folder and verify it. Returns the metrics."""
    from post_training.export import exporter as hf_export
    from post_training.models.builder import torch_dtype
    from post_training.quantization import quantizers

    dtype = torch_dtype(arguments.precision(args))
    if not args.allow_unexportable:
        quantizers.require_exportable(model)
    quantizers.unpack(model)
    exporter = hf_export.Exporter(
        model,
        loading.local_huggingface(source, args),
        dtype,
        trust_remote_code=args.trust_remote_code,
    )
    work = _begin(args, session)
    exporter.write(work, int(args.max_shard_size * _GIGABYTE), session.show_progress)
    return verify(exporter, work, dtype, session)


def write_draft(
    args: argparse.Namespace, session: Session, model: MegatronModule, source: Source
) -> dict[str, Any]:
    """The same for the draft. Returns the metrics.

    Raises:
        UsageError: if the draft has no form that engines read, or what was written is not it.
    """
    import torch

    from post_training.checkpoints import huggingface
    from post_training.drafts.eagle3 import attach as eagle
    from post_training.export import eagle3_readback
    from post_training.quantization import quantizers

    if not eagle.is_drafted(model):
        raise UsageError(f"--load {args.load}", "it has no draft", "name what eagle3.sh saved")
    quantizers.unpack(model)
    configuration = loading.local_huggingface(source, args)
    exporter = eagle3_exporter.DraftExporter(
        model,
        configuration,
        source.architecture.max_position_embeddings,
        trust_remote_code=args.trust_remote_code,
    )
    work = _begin(args, session)
    exporter.write(work, int(args.max_shard_size * _GIGABYTE))
    written = eagle3_readback.DraftFolder(work)
    trained = draft_of(source).aux_hidden_state_layer_ids if draft_of(source) else None
    problems = list(written.differences(exporter.reference()))
    if session.is_main:
        problems += written.problems(huggingface.read_config(configuration), trained)
    gathered: list[Any] = [None] * session.world
    torch.distributed.all_gather_object(gathered, problems)
    _require_none([problem for each in gathered for problem in each], work)
    logger.info("read back: %d tensors equal the draft's", len(written.index))
    if draft_of(source) is not None and not draft_of(source).trained:
        logger.warning("this draft has not been trained: its acceptance length is 1")
    return {
        "tensors_compared": len(written.index),
        "draft_vocab_size": written.config["draft_vocab_size"],
        "auxiliary_layers": written.config["eagle_config"]["eagle_aux_hidden_state_layer_ids"],
    }


def verify(
    exporter: Exporter, folder: Path, dtype: torch.dtype, session: Session
) -> dict[str, Any]:
    """Read ``folder`` back and compare it with the model; a collective call.

    Raises:
        UsageError: naming the first differences, on every rank.
    """
    import torch

    from post_training.export import readback

    written = readback.Folder(folder, session.device)
    problems = written.problems() if session.is_main else []
    names: list[str] = []
    for group in exporter.reference(session.show_progress):
        names += group
        problems += readback.compare(written, group.items(), dtype)
    gathered: list[Any] = [None] * session.world
    torch.distributed.all_gather_object(gathered, (problems, names))
    compared = {name for _, each in gathered for name in each}
    found = [problem for each, _ in gathered for problem in each]
    found += [f"{name} was not compared" for name in sorted(written.weight_names() - compared)]
    _require_none(found, folder)
    algorithm = written.quantization.get("quant_algo")
    logger.info("read back: %d tensors equal the model's, format %s", len(compared), algorithm)
    return {
        "tensors_compared": len(compared),
        "quant_algo": algorithm,
        "kv_cache_quant_algo": written.quantization.get("kv_cache_quant_algo"),
        "bits_per_weight": round(written.bits_per_weight(), 4),
    }


def _require_none(found: list[str], folder: Path) -> None:
    if found:
        raise UsageError(
            f"export {folder}",
            f"{len(found)} differences from the model: " + "; ".join(found[:5]),
            "this is a fault of the exporter, and the folder was not given its final name: report "
            "it with the command and run.json of the checkpoint",
        )


def main() -> None:
    args = arguments.parse_namespace("export", add_arguments, check)
    from post_training.cli.stage import open_session
    from post_training.common import report

    with open_session(args) as session:
        content = export(args, session)
        if session.is_main:
            rows, next_step = (draft_rows if args.export_extra_modules else model_rows)(
                args, content["metrics"]
            )
            rows["folder"] = f"{args.export_dir} ({report.size(Path(args.export_dir))})"
            report.summary("exported and verified", {**rows, **report.cost(content)}, next_step)
            if _source(args).draft is not None and not args.export_extra_modules:
                logger.info("the draft is exported by: %s", "export.sh --export-extra-modules")


def model_rows(args: argparse.Namespace, metrics: dict[str, Any]) -> tuple[dict[str, str], str]:
    """Lines of the summary, and what comes next."""
    return {
        "format": metrics["quant_algo"] or "not quantized",
        "KV cache": metrics["kv_cache_quant_algo"] or "not quantized",
        "bits per weight": f"{metrics['bits_per_weight']:.2f}, scales included",
        "read back": f"{metrics['tensors_compared']} tensors equal the model's",
    }, f"vllm serve {args.export_dir}"


def draft_rows(args: argparse.Namespace, metrics: dict[str, Any]) -> tuple[dict[str, str], str]:
    """The same for a draft."""
    layers = metrics["auxiliary_layers"]
    speculative = {"method": "eagle3", "model": args.export_dir, "num_speculative_tokens": 3}
    return {
        "draft": f"EAGLE-3, {metrics['draft_vocab_size']:,} tokens",
        "auxiliary layers": f"outputs of {layers} from 0; vLLM counts "
        f"{[layer + 1 for layer in layers]}",
        "read back": f"{metrics['tensors_compared']} tensors equal the draft's",
    }, f"vllm serve <exported target> --speculative-config '{json.dumps(speculative)}'"


def _source(args: argparse.Namespace) -> Source:
    if args.pretrained_model_name and not args.pretrained_model_path:
        args.pretrained_model_path = args.pretrained_model_name
    return find_source(args)


if __name__ == "__main__":
    main()
