"""Quantize a model and calibrate it; save a Megatron checkpoint with the scales.

Inputs:  --load, a Megatron checkpoint, or --pretrained-model-path, a Hugging Face folder or hub
         name; --export-quant-cfg, a format (README.md has the table) or auto, or --recipe, a file;
         --calib-dataset-path-or-name, text or conversations to calibrate on.
Outputs: --save, a checkpoint whose weights are unchanged and whose quantizers have their scales
         (with --compress the weights are packed), with run.json.

    MLM_MODEL_CKPT=/work/Qwen3-0.6B_mlm bash quantize.sh Qwen/Qwen3-0.6B FP8_DEFAULT_CFG
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from post_training.checkpoints import loading
from post_training.checkpoints.source import fetch_source, find_source, size_estimate
from post_training.common import outputs
from post_training.common.errors import UsageError
from post_training.config import arguments, checks
from post_training.data import options as calibration_options
from post_training.inference import smoke_generation
from post_training.models import parallel_check, tokenizer_files
from post_training.quantization import formats
from post_training.quantization import options as quantization_choice
from post_training.quantization.recipes import Recipe

if TYPE_CHECKING:
    from megatron.core.transformer import MegatronModule

    from post_training.distributed.session import Session
    from post_training.quantization.calibration import Calibration

logger = logging.getLogger("post_training")

_SEARCH_FORMATS = "FP8_DEFAULT_CFG,NVFP4_DEFAULT_CFG"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("quantize").add_argument
    add("--export-quant-cfg", metavar="NAME", help=f"format, or auto ({formats.DEFAULT})")
    add("--recipe", metavar="FILE", help="recipe file of ModelOpt, or a built-in one's name")
    add(
        "--export-kv-cache-quant",
        choices=list(formats.KV_CACHE),
        default="none",
        help="quantize keys and values too (%(default)s)",
    )
    add("--weight-only", action="store_true", help="leave the linear layers' inputs in 16 bits")
    add(
        "--disable-qkv-quant",
        action="store_true",
        help="leave the linears that compute queries, keys and values in 16 bits",
    )
    add("--compress", action="store_true", help="pack the weights into their low-bit form")
    add(
        "--export-real-quant-cfg",
        metavar="NAME",
        help="the same as --export-quant-cfg NAME --compress",
    )
    add(
        "--sync-expert-weight-amax",
        action="store_true",
        help="give all experts of a layer the same weight scale",
    )
    add(
        "--allow-unexportable",
        action="store_true",
        help="quantize even if no engine would read the export correctly",
    )
    calibration_options.add_arguments(add)
    add(
        "--auto-quantize-bits",
        type=float,
        default=4.8,
        metavar="X",
        help="auto: stored bits per weight of the linear layers, at most (%(default)s)",
    )
    add(
        "--auto-quantize-formats",
        default=_SEARCH_FORMATS,
        metavar="A,B",
        help="auto: formats to choose from (%(default)s)",
    )
    add(
        "--auto-quantize-method",
        choices=("gradient", "kl_div"),
        default="gradient",
        help="auto: how sensitivity is measured (%(default)s)",
    )
    add(
        "--auto-quantize-score-size",
        type=int,
        default=128,
        metavar="N",
        help="auto: sequences to measure it on (%(default)s)",
    )
    add(
        "--auto-quantize-checkpoint",
        metavar="FILE",
        help="auto: keep the measurements here; the rank is added to its name",
    )
    smoke_generation.add_arguments(add)


def check(args: argparse.Namespace) -> None:
    checks.required(args, "--save", "MLM_MODEL_SAVE")
    calibration_options.positive(args, "auto_quantize_score_size")
    smoke_generation.check(args)
    if args.context_parallel_size > 1:
        raise UsageError(
            f"CP={args.context_parallel_size}", "sequences are not divided here", "CP=1; raise DP"
        )
    source = find_source(args)
    if source.manifest is not None and source.manifest.get("quantization"):
        raise UsageError(
            f"--load {args.load}",
            f"it is already quantized: {source.manifest['quantization'].get('format')}",
            "quantize the checkpoint that convert.sh made",
        )
    if source.described is not None:
        parallel_check.check(source.architecture, arguments.parallel(args))
    quantization_choice.check(args, source.described)
    if args.tokenizer_model:
        tokenizer_files.check(args.tokenizer_model)
    calibration_options.check(args)
    outputs.check_folder(Path(args.save), overwrite=args.overwrite, needed=size_estimate(source, 2))


def quantize(args: argparse.Namespace, session: Session) -> tuple[MegatronModule, dict[str, Any]]:
    """Load, quantize, check, save. Returns this rank's model and, on rank 0, the manifest.

    Raises:
        UsageError: if the format cannot be exported, or a weight that it matches has no scale.
    """
    from post_training.checkpoints import huggingface, torch_dist
    from post_training.common.manifest import Manifest
    from post_training.quantization import calibration, coverage, quantizers
    from post_training.quantization import report as quantization_report

    choice = quantization_choice.chosen(args)
    source = fetch_source(find_source(args), args)
    # Activations are small here, and generation needs them whole.
    small_files = loading.local_huggingface(source, args)
    tokenizer = loading.tokenizer(source, args)
    samples = calibration_options.load(args, tokenizer, source.architecture)
    model = loading.load(source, args, session)
    run = calibration.Calibration(samples, args.calib_batch_size, session.show_progress)
    if quantization_choice.is_search(choice):
        config, search = search_formats(args, choice, model, run)
        reached = coverage.survey(model, None)
        found = quantizers.judge_model(model)
    else:
        config, search = with_format(args, choice, model, run), None
        reached = coverage.survey(model, config)
        found = quantizers.judge_model(model, quantizers.method_of(config))
    if not found.exportable:
        if not args.allow_unexportable:
            raise formats.unexportable("the quantized model", found)
        logger.warning("export will refuse this checkpoint: %s", found.reason)
    if args.compress:
        quantizers.compress(model)
    content = torch_dist.save(
        model,
        Path(args.save),
        Manifest(
            "quantize",
            source.architecture.to_json(),
            configuration=arguments.explicit(args),
            inputs=source.inputs(),
            metrics=quantization_report.metrics(run, reached, search),
            started=session.started,
            peak_memory_bytes=session.peak_memory(),
            extra={
                "quantization": quantization_report.described(args, choice, found, config),
                **source.pruned_from(),
            },
        ),
        write_huggingface=lambda folder: huggingface.copy_small_files(
            small_files, folder, python_files=args.trust_remote_code
        ),
    )
    if session.is_main:
        quantization_report.show(args, content or {}, reached, found, session)
    return model, content or {}


def with_format(
    args: argparse.Namespace,
    choice: Any,
    model: MegatronModule,
    run: Calibration,
) -> dict[str, Any]:
    """Quantize by one configuration and calibrate. Returns the configuration."""
    from post_training.quantization import calibration, coverage, quantizers

    config = quantizers.configuration(
        choice,
        weight_only=args.weight_only,
        disable_qkv=args.disable_qkv_quant,
        kv_cache=args.export_kv_cache_quant,
    )
    if args.sync_expert_weight_amax:
        config["algorithm"] = quantizers.with_option(
            config["algorithm"], "sync_expert_weight_amax", True
        )
    quantizers.insert(model, config)
    coverage.survey(model, config)
    if not args.allow_unexportable:
        quantizers.require_exportable(model, quantizers.method_of(config))
    quantizers.require_savable(model)
    with calibration.watching(model) as seen:
        quantizers.calibrate(model, config, run if quantizers.needs_data(model, config) else None)
    rows = run.probe(model, seen)
    coverage.check_scales(model, rows, dynamic_inputs=not quantizers.method_of(config))
    return config


def search_formats(
    args: argparse.Namespace, choice: Recipe | str, model: MegatronModule, run: Calibration
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Search a format for each layer. Returns the KV configuration and what was found."""
    from post_training.quantization import auto as auto_quantize
    from post_training.quantization import coverage, quantizers

    kept = Path(args.auto_quantize_checkpoint) if args.auto_quantize_checkpoint else None
    cache = formats.KV_CACHE[args.export_kv_cache_quant][0]
    kv_entries = quantizers.cache_entries(cache) if cache else []
    if isinstance(choice, Recipe):
        search, of_recipe = auto_quantize.from_recipe(choice, kept)
        kv_entries = kv_entries or of_recipe or []
    else:
        search = auto_quantize.Search(
            bits=args.auto_quantize_bits,
            formats=tuple(args.auto_quantize_formats.split(",")),
            method=args.auto_quantize_method,
            score_size=args.auto_quantize_score_size,
            checkpoint=kept,
            disabled=tuple(
                pattern.removesuffix(".*") for pattern in quantizers.QKV_PATTERNS
            ) if args.disable_qkv_quant else (),
        )  # fmt: skip
    found = auto_quantize.run(model, search, run, kv_entries)
    if args.weight_only:
        quantizers.disable_inputs(model)
    coverage.check_scales(model, run.probe(model))
    return {"quant_cfg": kv_entries, "algorithm": "auto_quantize"}, found


def main() -> None:
    args = arguments.parse_namespace("quantize", add_arguments, check)
    from post_training.cli.stage import open_session

    with open_session(args) as session:
        model, _ = quantize(args, session)
        smoke_generation.run(args, model, find_source(args))


if __name__ == "__main__":
    main()
