"""The command line of every stage, checked, and what it says about the model.

A stage calls :func:`parse` with its own flags and its own check; mistakes end with exit code 2 and
one message. The flags themselves are in ``parser.py``. Nothing here imports torch, so a usage
error shows within a second.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from post_training.common.errors import UsageError, exit_with_usage_error
from post_training.config import flags
from post_training.config.flags import spelled as flag
from post_training.config.options import StageOptions
from post_training.config.parser import make_parser
from post_training.distributed import placement
from post_training.distributed.parallel import Parallel
from post_training.models import architecture as model_architecture
from post_training.models import tokenizer_files, transformer_fields
from post_training.models.architecture import MLA_FIELDS, REQUIRED, TRANSFORMER_FIELDS, Architecture
from post_training.models.parallel_check import check as check_division

logger = logging.getLogger("post_training")

_VOCABULARY_MULTIPLE = 128  # Megatron-LM's default of --make-vocab-size-divisible-by
# Fields that other functions of this module answer for.
_PARALLEL_FIELDS = frozenset(
    """
    tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size
    expert_model_parallel_size expert_tensor_parallel_size sequence_parallel
    num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage
    """.split()
)
_PRECISION_FIELDS = frozenset(("bf16", "fp16", "params_dtype", "pipeline_dtype"))
_OWN_STATED = (
    "position_embedding_type",
    "rotary_base",
    "rotary_percent",
    "rope_scaling",
    "rope_scaling_factor",
    "max_position_embeddings",
    "hybrid_layer_pattern",
)


def parse[Options: StageOptions](
    stage: str,
    options: type[Options],
    argv: Sequence[str] | None = None,
    description: str | None = None,
) -> Options:
    """The options of ``stage`` that a command line states, each flag checked by itself.

    Args:
        stage: name of the stage, e.g. ``convert``; its ``.py`` is the program in messages.
        options: class of the stage's options; its fields add the stage's own flags.
        argv: the command line, by default this process's.
        description: text above the flags in ``--help``, by default the main module's docstring.

    Raises:
        UsageError: for an unknown flag, or a value that cannot be.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = make_parser(
        stage,
        lambda parser: flags.add(parser, options, stage, getattr(options, "DEFAULTS", None)),
        show_all="--help-all" in words,
        description=description,
    )
    defaults, given = parser.split(words)
    ignored = given.pop("ignored_flags", [])
    args = argparse.Namespace(**{**defaults, **given}, explicit=given)
    shared: dict[str, Any] = {
        "stage": stage,
        # run.json records them.
        "given": {n: str(v) if isinstance(v, Path) else v for n, v in given.items()},
        "ignored_flags": tuple(dict.fromkeys(ignored)),
        "load": args.load,
        "save": args.save,
        "overwrite": args.overwrite,
        "pretrained_model_path": args.pretrained_model_path,
        "tokenizer_model": args.tokenizer_model,
        "trust_remote_code": args.trust_remote_code,
        "seed": args.seed,
        "distributed_timeout_minutes": args.distributed_timeout_minutes,
        "log_level": args.log_level,
        "check_only": args.check,
        "dry_run": args.dry_run,
        "parallel": parallel(args),
        "precision": precision(args),
        "layer_spec": "transformer_engine" if args.export_default_te_spec else "modelopt",
        "local_attention": args.export_force_local_attention,
        "meta_device": args.init_model_with_meta_device,
        # As Megatron-LM does: confs of large models carry the flag, also to TP=1.
        "sequence_parallel": args.sequence_parallel and args.tensor_model_parallel_size > 1,
        "seq_length": args.seq_length,
        "stated": stated(args),
        "vocabulary_multiple": _vocabulary_multiple(args),
        "overrides": transformer_overrides(args),
    }
    return options(**shared, **flags.read(options, args))


def parse_namespace(
    stage: str,
    add_stage_arguments: Callable[[argparse.ArgumentParser], None],
    check: Callable[[argparse.Namespace], None],
    argv: Sequence[str] | None = None,
) -> argparse.Namespace:
    """The checked arguments of ``stage``; leaves with exit code 2 after a usage error.

    Args:
        stage: name of the stage, e.g. ``convert``; its ``.py`` is the program in messages.
        add_stage_arguments: adds the stage's own flags.
        check: raises UsageError for values that cannot work; must not import torch.
        argv: the command line, by default this process's.

    With ``--check`` the process ends here with exit code 0 and prints nothing, with ``--dry-run``
    it prints what the stage would do (``plan.py``). Besides the flags'
    values the namespace has ``stage``, ``explicit`` (what was given, by name) and
    ``ignored_flags`` (flags without meaning here, also logged at level debug).
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        parser = make_parser(stage, add_stage_arguments, show_all="--help-all" in words)
        defaults, given = parser.split(words)
        ignored = given.pop("ignored_flags", [])
        args = argparse.Namespace(**{**defaults, **given}, stage=stage, explicit=given)
        args.ignored_flags = list(dict.fromkeys(ignored))
        # As Megatron-LM does: confs of large models carry the flag, also to TP=1.
        args.sequence_parallel = args.sequence_parallel and args.tensor_model_parallel_size > 1
        # Until every stage has typed options, the library's functions take either.
        args.given, args.check_only = given, args.check
        args.parallel, args.precision = parallel(args), precision(args)
        args.layer_spec = "transformer_engine" if args.export_default_te_spec else "modelopt"
        args.local_attention = args.export_force_local_attention
        args.meta_device = args.init_model_with_meta_device
        args.stated, args.overrides = stated(args), transformer_overrides(args)
        args.vocabulary_multiple = _vocabulary_multiple(args)
        _check_division(args)
        check(args)
        _check_tokenizer(args)
        if args.dry_run:
            from post_training.checkpoints.source import find_source
            from post_training.cli import dry_run

            named = getattr(args, "pretrained_model_name", None)
            args.pretrained_model_path = args.pretrained_model_path or named
            dry_run.show(args, find_source(args))  # type: ignore[arg-type]
            sys.exit(0)
    except UsageError as error:
        exit_with_usage_error(error)
    if args.check:
        sys.exit(0)
    if args.ignored_flags:
        logger.debug("flags without meaning here: %s", " ".join(args.ignored_flags))
    return args


def explicit(args: argparse.Namespace) -> dict[str, Any]:
    """What the command line (the conf's flags included) really gave, by name."""
    return dict(args.explicit)


def parallel(args: argparse.Namespace) -> Parallel:
    """The parallel sizes, for the number of processes that torchrun or SLURM started.

    With ``--check`` and ``--dry-run``, which run before anything is launched, the processes are as
    many as needed, or as the launcher is going to start.
    """
    planned = os.environ.get("MLM_PLANNED_PROCESSES", "")
    world: int | None = int(planned) if planned.isdigit() else None
    if not (args.check or args.dry_run):
        world = placement.placement().world
    return Parallel.of_world(
        world,
        tensor=args.tensor_model_parallel_size,
        pipeline=args.pipeline_model_parallel_size,
        context=args.context_parallel_size,
        expert=args.expert_model_parallel_size,
        expert_tensor=args.expert_tensor_parallel_size,
        first_layers=args.num_layers_in_first_pipeline_stage,
        last_layers=args.num_layers_in_last_pipeline_stage,
    )


def precision(args: argparse.Namespace) -> str:
    """``fp32``, ``fp16`` or ``bf16`` (the default). ``--fp32`` overrides a conf's ``--bf16``."""
    if args.fp32:
        return "fp32"
    if args.fp16 and args.bf16:
        raise UsageError("--bf16 --fp16", "a model has one precision", "give one of them")
    return "fp16" if args.fp16 else "bf16"


def transformer_overrides(args: argparse.Namespace) -> dict[str, Any]:
    """Given fields of TransformerConfig that say how the model is run: fusions, recompute, ...

    Parallel sizes and precision are left out; :func:`parallel` and :func:`precision` have them.
    """
    apart = TRANSFORMER_FIELDS | MLA_FIELDS | _PARALLEL_FIELDS | _PRECISION_FIELDS
    apart |= {"rotary_base", "rotary_percent"}
    return {
        name: value
        for name, value in args.explicit.items()
        if name in transformer_fields.load() and name not in apart
    }


def stated(args: argparse.Namespace) -> dict[str, Any]:
    """What the flags state about the model, by the flat names of ``Architecture.resolved``."""
    given = args.explicit
    names = TRANSFORMER_FIELDS | MLA_FIELDS | set(_OWN_STATED)
    found = {name: value for name, value in given.items() if name in names}
    if given.get("group_query_attention"):
        found.setdefault("num_query_groups", 1)  # as in Megatron-LM
    if given.get("hybrid_layer_pattern"):
        # One letter a layer; | separates pipeline stages, what follows / predicts further tokens.
        layers = given["hybrid_layer_pattern"].split("/")[0].replace("|", "")
        found.setdefault("num_layers", len(layers))
    if given.get("untie_embeddings_and_output_weights"):
        found["share_embeddings_and_output_weights"] = False
    if given.get("export_model_type", "GPTModel") != "GPTModel":
        found["model_type"] = given["export_model_type"]
    vocabulary = _stated_vocabulary(args)
    if vocabulary is not None:
        found["vocab_size"] = vocabulary
    return found


def architecture(
    args: argparse.Namespace,
    huggingface_config: Mapping[str, Any] | None = None,
    manifest: Mapping[str, Any] | None = None,
) -> Architecture:
    """The model's architecture: from the checkpoint where there is one, else from the flags.

    A ``config.json`` or a manifest describes the weights, so its values are taken; a flag (the
    conf) that contradicts it is an error. What flags leave unsaid is not a contradiction: confs of
    Megatron-LM do not state everything (their Llama 3.2 conf leaves out the factor of its rotary
    scaling).

    Args:
        args: from :func:`parse`.
        huggingface_config: content of the source's ``config.json``.
        manifest: content of the Megatron checkpoint's ``run.json``.

    Raises:
        UsageError: all contradictions in one message, or the flags that are missing.
    """
    said = stated(args)
    if manifest is not None and manifest.get("architecture"):
        return model_architecture.reconcile(said, manifest, f"--load {args.load}")
    if huggingface_config is None:
        return _from_flags(args, said)
    found = model_architecture.from_huggingface(huggingface_config)
    wrong = found.contradictions(said)
    if wrong:
        raise UsageError(
            f"--pretrained-model-path {args.pretrained_model_path}",
            f"it is not the model of the conf: "
            f"{model_architecture.show(wrong, 'the conf', 'config.json')}",
            "name the conf of this model, or the folder of the conf's model",
        )
    return found


def _check_division(args: argparse.Namespace) -> None:
    """Check that the processes divide the conf's model, before it is known that it is there.

    A checkpoint (``--load``) may be a pruned form of the conf's model: then the stage checks.
    """
    sizes, said = parallel(args), stated(args)
    if not args.load and all(said.get(name) for name in REQUIRED):
        transformer = {n: v for n, v in said.items() if n in TRANSFORMER_FIELDS | MLA_FIELDS}
        check_division(Architecture(transformer, said.get("vocab_size", 0), 0), sizes)


def _check_tokenizer(args: argparse.Namespace) -> None:
    """Check a tokenizer folder that is not the model's own; a hub name has no folder."""
    named = args.tokenizer_model
    if named and named != args.pretrained_model_path:
        tokenizer_files.check(named)


def _from_flags(args: argparse.Namespace, said: dict[str, Any]) -> Architecture:
    missing = [flag(name) for name in REQUIRED if not said.get(name)]
    if "vocab_size" not in said:
        found = tokenizer_files.vocabulary(Path(args.tokenizer_model or ""))
        if found is None:
            missing.append("--padded-vocab-size")
        else:
            said["vocab_size"] = _padded(args, found)
    if missing:
        raise UsageError(
            f"the model's architecture: no {', '.join(missing)}",
            "there is no config.json or run.json to take it from, and the flags do not state it",
            "name a conf (conf/<org>/<model>.sh), or give these flags",
        )
    transformer = {n: v for n, v in said.items() if n in TRANSFORMER_FIELDS | MLA_FIELDS}
    own = {n: v for n, v in said.items() if n not in transformer}
    own.setdefault("max_position_embeddings", args.seq_length or 4096)
    own.setdefault("share_embeddings_and_output_weights", True)
    return Architecture(transformer=transformer, **own)


def _stated_vocabulary(args: argparse.Namespace) -> int | None:
    """Rows of the embedding as the flags state them; None if they do not."""
    given = args.explicit
    if "padded_vocab_size" in given:
        return int(args.padded_vocab_size)
    if "vocab_size" in given:
        return (
            _padded(args, args.vocab_size) if args.make_vocab_size_divisible_by else args.vocab_size
        )
    return None


def _padded(args: argparse.Namespace, size: int) -> int:
    """``size`` padded as Megatron-LM does: to a multiple of N x tensor parallel size."""
    multiple = _vocabulary_multiple(args)
    return -(-size // multiple) * multiple


def _vocabulary_multiple(args: argparse.Namespace) -> int:
    multiple: int = args.make_vocab_size_divisible_by or _VOCABULARY_MULTIPLE
    return multiple * int(args.tensor_model_parallel_size)
