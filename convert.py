"""Hugging Face -> Megatron checkpoint, or Megatron checkpoint -> one of another layout.

Inputs:  --pretrained-model-path, a Hugging Face folder or hub name with safetensors, or --load, a
         Megatron checkpoint (a quantized one too); the architecture comes from the conf's flags and
         must agree. --algorithm eagle3 attaches a draft, to be trained by eagle3.sh.
Outputs: --save, a Megatron-LM checkpoint (torch_dist) with run.json, that loads at any TP and PP;
         configuration and tokenizer travel along in its folder huggingface/.

    HF_MODEL_CKPT=/models/Qwen3-0.6B TP=2 bash convert.sh Qwen/Qwen3-0.6B
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from post_training.checkpoints import folders, loading
from post_training.common import outputs
from post_training.common.errors import UsageError
from post_training.config import arguments, checks
from post_training.drafts import options as draft_arguments
from post_training.models import parallel_check

if TYPE_CHECKING:
    from megatron.core.transformer import MegatronModule

    from post_training.checkpoints.loading import Source
    from post_training.distributed.runtime import Session
    from post_training.drafts.eagle3.draft import Draft

EAGLE3 = "give --algorithm eagle3 too"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("convert")
    group.add_argument(
        "--extra-model-path",
        metavar="FOLDER",
        help="take tokenizer and configuration files from here instead of the model's folder",
    )
    group.add_argument(
        "--algorithm",
        choices=("eagle3", "None"),
        default="None",
        help="what to attach: an EAGLE-3 draft, or nothing (%(default)s)",
    )
    group.add_argument(
        "--export-offline-model",
        action="store_true",
        help="leave out the target's layers: for training from features only (--algorithm eagle3)",
    )
    group.add_argument(
        "--draft-model-path",
        metavar="DIR",
        help="take the draft's weights from this checkpoint, e.g. one trained without the "
        "target's layers (--algorithm eagle3)",
    )
    draft_arguments.add(parser)


def check(args: argparse.Namespace) -> None:
    checks.required(args, "--save", "MLM_MODEL_SAVE")
    source = loading.find(args)
    _check_draft(args, source)
    if source.described:
        parallel_check.check(source.described, arguments.parallel(args))
    if args.extra_model_path:
        folders.model_folder(Path(args.extra_model_path), weights=False)
    outputs.check_folder(
        Path(args.save), overwrite=args.overwrite, needed=loading.size_estimate(source, 2)
    )


def _check_draft(args: argparse.Namespace, source: Source) -> None:
    """Everything about the draft that can be known before its target is loaded."""
    if args.algorithm == "None":
        for name in ("export_offline_model", "draft_model_path", *draft_arguments.NAMES):
            if name in args.explicit:
                flag = "--" + name.replace("_", "-")
                raise UsageError(flag, "it is about a draft, and none is attached", EAGLE3)
        return
    if source.draft is not None:
        raise UsageError(
            f"--load {args.load}",
            f"it has a draft already, trained for {source.draft.trained} iterations",
            "train it with eagle3.sh, or attach a new one to the checkpoint without a draft",
        )
    if args.export_offline_model and args.pipeline_model_parallel_size > 1:
        raise UsageError(
            f"--export-offline-model PP={args.pipeline_model_parallel_size}",
            "without its layers the model has one pipeline stage",
            "PP=1",
        )
    if args.draft_model_path:
        draft_arguments.trained(args.draft_model_path, args, source.described)
    elif source.described is not None:
        draft_arguments.plan(args, source.described)


def convert(args: argparse.Namespace, session: Session) -> dict[str, Any]:
    """Load the source at the requested layout and save it. Returns the manifest on rank 0."""
    from post_training.checkpoints import huggingface, torch_dist
    from post_training.common.manifest import Manifest
    from post_training.models.builder import count_parameters

    source = loading.fetch(loading.find(args), args)
    options = loading.build_options(args, source)
    small_files = Path(args.extra_model_path or loading.local_huggingface(source, args))
    model = loading.load(source, options, session, trust_remote_code=args.trust_remote_code)
    parameters = count_parameters(model)
    metrics = {"parameters": parameters, "dtype": options.dtype}
    extra = source.carried()
    if args.algorithm == "eagle3":
        draft = attach_draft(args, model, source)
        extra["draft"] = draft.to_json()
        metrics["draft_parameters"] = count_parameters(model) - parameters
        if draft.offline:
            model.decoder.layers = type(model.decoder.layers)()
    record = Manifest(
        "convert",
        source.architecture.to_json(),
        configuration=arguments.explicit(args),
        inputs=source.inputs(),
        metrics=metrics,
        started=session.started,
        peak_memory_bytes=session.peak_memory(),
        extra=extra,
    )
    content = torch_dist.save(
        model,
        Path(args.save),
        record,
        write_huggingface=lambda folder: huggingface.copy_small_files(
            small_files, folder, python_files=args.trust_remote_code
        ),
    )
    return content or {}


def attach_draft(args: argparse.Namespace, model: MegatronModule, source: Source) -> Draft:
    """Attach the draft that the arguments describe; from ``--draft-model-path`` with weights."""
    from post_training.checkpoints import torch_dist
    from post_training.drafts.eagle3 import attach as eagle

    if not args.draft_model_path:
        draft = draft_arguments.plan(args, source.architecture, args.export_offline_model)
        eagle.attach(model, draft, args.seed)
        return draft
    draft = draft_arguments.trained(args.draft_model_path, args, source.architecture)
    draft = replace(draft, offline=args.export_offline_model)
    eagle.attach(model, draft, args.seed)
    torch_dist.load(model, Path(args.draft_model_path), only=eagle.MODULE)
    return draft


def main() -> None:
    args = arguments.parse("convert", add_arguments, check)
    from post_training.common import report
    from post_training.distributed import runtime

    with runtime.session(args) as session:
        content = convert(args, session)
        if session.is_main:
            drafted = content["metrics"].get("draft_parameters")
            next_step = f"MLM_MODEL_CKPT={args.save} bash quantize.sh <conf> FP8_DEFAULT_CFG"
            if drafted:
                next_step = f"MLM_MODEL_SAVE={args.save} bash eagle3.sh <conf>"
            report.summary(
                "converted",
                {
                    "parameters": f"{content['metrics']['parameters']:,}",
                    **({"draft": f"{drafted:,} parameters, to be trained"} if drafted else {}),
                    "checkpoint": f"{args.save} ({report.size(Path(args.save))})",
                    "layout saved": report.layout(session.parallel) + ", loads at any",
                    **report.cost(content),
                },
                next_step=next_step,
            )


if __name__ == "__main__":
    main()
