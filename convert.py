"""Hugging Face -> Megatron checkpoint, or Megatron checkpoint -> one of another layout.

Inputs:  --pretrained-model-path, a Hugging Face folder or hub name with safetensors, or --load, a
         Megatron checkpoint; the architecture comes from the conf's flags and must agree.
Outputs: --save, a Megatron-LM checkpoint (torch_dist) with run.json, that loads at any TP and PP;
         configuration and tokenizer travel along in its folder huggingface/.

    HF_MODEL_CKPT=/models/Qwen3-0.6B TP=2 bash convert.sh Qwen/Qwen3-0.6B
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from post_training import arguments, loading, preflight

if TYPE_CHECKING:
    from post_training.runtime import Session


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("convert")
    group.add_argument(
        "--extra-model-path",
        metavar="FOLDER",
        help="take tokenizer and configuration files from here instead of the model's folder",
    )


def check(args: argparse.Namespace) -> None:
    preflight.required(args, "--save", "MLM_MODEL_SAVE")
    source = loading.find(args)
    if source.described:
        preflight.check_layout(source.described, args)
    if args.extra_model_path:
        preflight.model_folder(Path(args.extra_model_path), weights=False)
    preflight.check_output(Path(args.save), args, needed=loading.size_estimate(source, 2))


def convert(args: argparse.Namespace, session: Session) -> dict[str, Any]:
    """Load the source at the requested layout and save it. Returns the manifest on rank 0."""
    from post_training import checkpoint, huggingface
    from post_training.manifest import Manifest
    from post_training.model import count_parameters

    source = loading.fetch(loading.find(args), args)
    options = loading.build_options(args, source)
    small_files = Path(args.extra_model_path or loading.local_huggingface(source, args))
    model = loading.load(source, options, session, trust_remote_code=args.trust_remote_code)
    parameters = count_parameters(model)
    record = Manifest(
        "convert",
        source.architecture.to_json(),
        configuration=arguments.explicit(args),
        inputs=source.inputs(),
        metrics={"parameters": parameters, "dtype": options.dtype},
        started=session.started,
        peak_memory_bytes=session.peak_memory(),
        extra=source.pruned_from(),
    )
    content = checkpoint.save(
        model,
        Path(args.save),
        record,
        write_huggingface=lambda folder: huggingface.copy_small_files(
            small_files, folder, python_files=args.trust_remote_code
        ),
    )
    return content or {}


def main() -> None:
    args = arguments.parse("convert", add_arguments, check)
    from post_training import report, runtime

    with runtime.session(args) as session:
        content = convert(args, session)
        if session.is_main:
            report.summary(
                "converted",
                {
                    "parameters": f"{content['metrics']['parameters']:,}",
                    "checkpoint": f"{args.save} ({report.size(Path(args.save))})",
                    "layout saved": report.layout(session.parallel) + ", loads at any",
                    **report.cost(content),
                },
                next_step=f"MLM_MODEL_CKPT={args.save} bash quantize.sh <conf> FP8_DEFAULT_CFG",
            )


if __name__ == "__main__":
    main()
