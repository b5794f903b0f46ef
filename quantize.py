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
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from post_training import arguments, formats, loading, preflight, quantization_choice
from post_training.errors import UsageError
from post_training.recipes import Recipe

if TYPE_CHECKING:
    from megatron.core.transformer import MegatronModule

    from post_training.calibration import Calibration
    from post_training.loading import Source
    from post_training.runtime import Session

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
    add(
        "--calib-dataset-path-or-name",
        default="cnn_dailymail",
        metavar="PATH_OR_NAME",
        help="JSONL, parquet, CSV or text, a folder of such, or a hub name (%(default)s)",
    )
    add("--calib-size", type=int, default=1024, metavar="N", help="sequences (%(default)s)")
    add(
        "--calib-max-sequence-length",
        type=int,
        default=4096,
        metavar="N",
        help="tokens a sequence (%(default)s)",
    )
    add(
        "--calib-batch-size",
        type=int,
        default=1,
        metavar="N",
        help="sequences a forward pass (%(default)s)",
    )
    add(
        "--calib-use-random-offset",
        action="store_true",
        help="start each document at a random place",
    )
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
    add(
        "--prompts",
        default="Hello!|Born in California, Soyer trained as a",
        metavar="A|B",
        help="prompts of the smoke generation",
    )
    add("--references", default="", metavar="A|B", help="texts that it should begin with")
    add("--generate-output-len", type=int, default=32, metavar="N", help="tokens (%(default)s)")
    add("--skip-generate", action="store_true", help="no smoke generation")  # fmt: skip


def check(args: argparse.Namespace) -> None:
    preflight.required(args, "--save", "MLM_MODEL_SAVE")
    for name in ("calib_size", "calib_max_sequence_length", "calib_batch_size",
                 "generate_output_len", "auto_quantize_score_size"):  # fmt: skip
        if getattr(args, name) < 1:
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"{flag} {getattr(args, name)}", "it is not positive", "1 or more")
    if args.context_parallel_size > 1:
        raise UsageError(
            f"CP={args.context_parallel_size}", "sequences are not divided here", "CP=1; raise DP"
        )
    source = loading.find(args)
    if source.manifest is not None and source.manifest.get("quantization"):
        raise UsageError(
            f"--load {args.load}",
            f"it is already quantized: {source.manifest['quantization'].get('format')}",
            "quantize the checkpoint that convert.sh made",
        )
    if source.described is not None:
        preflight.check_layout(source.architecture, args)
    quantization_choice.check(args, source.described)
    if args.tokenizer_model:
        preflight.tokenizer(args.tokenizer_model)
    preflight.data(args.calib_dataset_path_or_name, "--calib-dataset-path-or-name")
    preflight.check_output(Path(args.save), args, needed=loading.size_estimate(source, 2))


def quantize(args: argparse.Namespace, session: Session) -> tuple[MegatronModule, dict[str, Any]]:
    """Load, quantize, check, save. Returns this rank's model and, on rank 0, the manifest.

    Raises:
        UsageError: if the format cannot be exported, or a weight that it matches has no scale.
    """
    from post_training import (
        calibration,
        checkpoint,
        coverage,
        data,
        huggingface,
        quantization,
        quantization_report,
    )
    from post_training.manifest import Manifest

    choice = quantization_choice.chosen(args)
    source = loading.fetch(loading.find(args), args)
    # Activations are small here, and generation needs them whole.
    options = replace(loading.build_options(args, source), sequence_parallel=False)
    small_files = loading.local_huggingface(source, args)
    tokenizer = loading.tokenizer(source, args)
    length = min(args.calib_max_sequence_length, source.architecture.max_position_embeddings)
    samples = data.on_first_rank(
        lambda: data.load_calibration_data(
            args.calib_dataset_path_or_name,
            tokenizer,
            args.calib_size,
            length,
            random_offset=args.calib_use_random_offset,
            seed=args.seed,
        )
    )
    logger.info("calibration data: %s", samples.describe())
    model = loading.load(source, options, session, trust_remote_code=args.trust_remote_code)
    run = calibration.Calibration(samples, args.calib_batch_size, session.show_progress)
    if quantization_choice.is_search(choice):
        config, search = search_formats(args, choice, model, run)
        reached = coverage.survey(model, None)
        found = quantization.verdict(model)
    else:
        config, search = with_format(args, choice, model, run), None
        reached = coverage.survey(model, config)
        found = quantization.verdict(model, quantization.method_of(config))
    if not found.exportable:
        if not args.allow_unexportable:
            raise formats.unexportable("the quantized model", found)
        logger.warning("export will refuse this checkpoint: %s", found.reason)
    if args.compress:
        quantization.compress(model)
    content = checkpoint.save(
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
    from post_training import calibration, coverage, quantization

    config = quantization.configuration(
        choice,
        weight_only=args.weight_only,
        disable_qkv=args.disable_qkv_quant,
        kv_cache=args.export_kv_cache_quant,
    )
    if args.sync_expert_weight_amax:
        config["algorithm"] = quantization.with_option(
            config["algorithm"], "sync_expert_weight_amax", True
        )
    quantization.insert(model, config)
    coverage.survey(model, config)
    if not args.allow_unexportable:
        quantization.require_exportable(model, quantization.method_of(config))
    quantization.require_savable(model)
    with calibration.watching(model) as seen:
        quantization.calibrate(
            model, config, run if quantization.needs_data(model, config) else None
        )
    rows = run.probe(model, seen)
    coverage.check_scales(model, rows, dynamic_inputs=not quantization.method_of(config))
    return config


def search_formats(
    args: argparse.Namespace, choice: Recipe | str, model: MegatronModule, run: Calibration
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Search a format for each layer. Returns the KV configuration and what was found."""
    from post_training import auto_quantize, coverage, quantization

    kept = Path(args.auto_quantize_checkpoint) if args.auto_quantize_checkpoint else None
    cache = formats.KV_CACHE[args.export_kv_cache_quant][0]
    kv_entries = quantization.cache_entries(cache) if cache else []
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
                pattern.removesuffix(".*") for pattern in quantization.QKV_PATTERNS
            ) if args.disable_qkv_quant else (),
        )  # fmt: skip
    found = auto_quantize.run(model, search, run, kv_entries)
    if args.weight_only:
        quantization.disable_inputs(model)
    coverage.check_scales(model, run.probe(model))
    return {"quant_cfg": kv_entries, "algorithm": "auto_quantize"}, found


def smoke_generation(args: argparse.Namespace, model: MegatronModule, source: Source) -> None:
    """Let the quantized model continue the prompts, to be looked at.

    The checkpoint is saved already: whatever fails here is a warning, and the stage succeeds.
    """
    from post_training import generation, quantization

    try:
        tokenizer = loading.tokenizer(source, args)
        prompts = args.prompts.split("|")
        references = args.references.split("|") if args.references else []
        tokens = [tokenizer(prompt)["input_ids"] for prompt in prompts]
        eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        with quantization.quiet():
            new = generation.generate(
                model, tokens, args.generate_output_len, eos, vocab_size=len(tokenizer)
            )
        for i, (prompt, ids) in enumerate(zip(prompts, new, strict=True)):
            text = tokenizer.decode(ids, skip_special_tokens=True)
            logger.info("smoke generation: %r -> %r", prompt, text)
            if i < len(references) and not text.strip().startswith(references[i].strip()):
                logger.warning("smoke generation: expected %r", references[i])
    except Exception as error:  # any failure: the result is on disk, and must not look lost
        logger.warning(
            "the smoke generation failed: %s: %s. The checkpoint %s is complete.",
            type(error).__name__,
            error,
            args.save,
        )
        logger.debug("smoke generation", exc_info=True)


def main() -> None:
    args = arguments.parse("quantize", add_arguments, check)
    from post_training import runtime

    with runtime.session(args) as session:
        model, _ = quantize(args, session)
        if not args.skip_generate:
            smoke_generation(args, model, loading.find(args))


if __name__ == "__main__":
    main()
