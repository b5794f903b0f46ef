"""Megatron checkpoint -> Hugging Face folder that vLLM, TensorRT-LLM or SGLang loads.

Inputs:  --load, a checkpoint that convert, quantize or prune saved; --pretrained-model-name, a
         folder or hub name with configuration and tokenizer, unless the checkpoint carries them.
Outputs: --export-dir with safetensors, tokenizer, config.json and, for a quantized model,
         hf_quant_config.json; run.json beside them. The folder is read back by independent code and
         compared with the model before it gets its name.

    MLM_MODEL_CKPT=/work/Qwen3-0.6B_quant bash export.sh Qwen/Qwen3-0.6B
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from post_training import arguments, files, loading, preflight
from post_training.errors import UsageError

if TYPE_CHECKING:
    import torch

    from post_training.hf_export import Exporter
    from post_training.loading import Source
    from post_training.runtime import Session

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
    preflight.required(args, "--export-dir", "EXPORT_DIR")
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
        preflight.check_layout(source.described, args)
    recorded = (source.manifest or {}).get("quantization") or {}
    if recorded.get("exportable") is False and not args.allow_unexportable:
        raise UsageError(
            f"--load {args.load}",
            f"it is quantized as {recorded.get('format')}, which cannot be exported: "
            f"{recorded.get('reason')}",
            "quantize the model in an exportable format (README.md has the table)",
        )
    preflight.check_output(Path(args.export_dir), args, needed=loading.size_estimate(source, 2))


def export(args: argparse.Namespace, session: Session) -> dict[str, Any]:
    """Write, read back, compare, publish. Returns the manifest on rank 0.

    Raises:
        UsageError: if the format cannot be exported, or what was written is not the model.
    """
    import torch

    from post_training import hf_export, quantization
    from post_training.manifest import Manifest
    from post_training.model import torch_dtype

    source = loading.fetch(_source(args), args)
    options = loading.build_options(args, source)
    model = loading.load(source, options, session, trust_remote_code=args.trust_remote_code)
    if not args.allow_unexportable:
        quantization.require_exportable(model)
    quantization.unpack(model)
    exporter = hf_export.Exporter(
        model,
        loading.local_huggingface(source, args),
        torch_dtype(options.dtype),
        trust_remote_code=args.trust_remote_code,
    )
    target = Path(args.export_dir)
    work = files.incomplete(target)
    if session.is_main:
        files.begin(target)
    torch.distributed.barrier()
    exporter.write(work, int(args.max_shard_size * _GIGABYTE), session.show_progress)
    metrics = verify(exporter, work, torch_dtype(options.dtype), session)
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
        ).write(work)
        files.publish(target)
    torch.distributed.barrier()
    return content or {}


def verify(
    exporter: Exporter, folder: Path, dtype: torch.dtype, session: Session
) -> dict[str, Any]:
    """Read ``folder`` back and compare it with the model; a collective call.

    Raises:
        UsageError: naming the first differences, on every rank.
    """
    import torch

    from post_training import readback

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
    if found:
        raise UsageError(
            f"export {folder}",
            f"{len(found)} differences from the model: " + "; ".join(found[:5]),
            "this is a fault of the exporter, and the folder was not given its final name: report "
            "it with the command and run.json of the checkpoint",
        )
    algorithm = written.quantization.get("quant_algo")
    logger.info("read back: %d tensors equal the model's, format %s", len(compared), algorithm)
    return {
        "tensors_compared": len(compared),
        "quant_algo": algorithm,
        "kv_cache_quant_algo": written.quantization.get("kv_cache_quant_algo"),
        "bits_per_weight": round(written.bits_per_weight(), 4),
    }


def main() -> None:
    args = arguments.parse("export", add_arguments, check)
    from post_training import report, runtime

    with runtime.session(args) as session:
        content = export(args, session)
        if session.is_main:
            metrics = content["metrics"]
            report.summary(
                "exported and verified",
                {
                    "format": metrics["quant_algo"] or "not quantized",
                    "KV cache": metrics["kv_cache_quant_algo"] or "not quantized",
                    "bits per weight": f"{metrics['bits_per_weight']:.2f}, scales included",
                    "read back": f"{metrics['tensors_compared']} tensors equal the model's",
                    "folder": f"{args.export_dir} ({report.size(Path(args.export_dir))})",
                    **report.cost(content),
                },
                next_step=f"vllm serve {args.export_dir}",
            )


def _source(args: argparse.Namespace) -> Source:
    if args.pretrained_model_name and not args.pretrained_model_path:
        args.pretrained_model_path = args.pretrained_model_name
    return loading.find(args)


if __name__ == "__main__":
    main()
