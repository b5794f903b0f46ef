"""From a command line to a stage's options. No torch.

The flags themselves are in ``parser.py``; what they state about the model becomes an architecture
in ``model_description.py``.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from post_training.common.errors import UsageError
from post_training.config import flags
from post_training.config.model_description import padded
from post_training.config.options import StageOptions
from post_training.config.parser import make_parser
from post_training.distributed import placement
from post_training.distributed.parallel import Parallel
from post_training.models import transformer_fields
from post_training.models.architecture import MLA_FIELDS, TRANSFORMER_FIELDS

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
        "parallel": _parallel(args),
        "precision": _precision(args),
        "layer_spec": "transformer_engine" if args.export_default_te_spec else "modelopt",
        "local_attention": args.export_force_local_attention,
        "meta_device": args.init_model_with_meta_device,
        # As Megatron-LM does: confs of large models carry the flag, also to TP=1.
        "sequence_parallel": args.sequence_parallel and args.tensor_model_parallel_size > 1,
        "seq_length": args.seq_length,
        "stated": _stated(args),
        "vocabulary_multiple": _vocabulary_multiple(args),
        "overrides": _overrides(args),
    }
    return options(**{**shared, **flags.read(options, args)})


def _parallel(args: argparse.Namespace) -> Parallel:
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


def _precision(args: argparse.Namespace) -> str:
    """``fp32``, ``fp16`` or ``bf16`` (the default). ``--fp32`` overrides a conf's ``--bf16``."""
    if args.fp32:
        return "fp32"
    if args.fp16 and args.bf16:
        raise UsageError("--bf16 --fp16", "a model has one precision", "give one of them")
    return "fp16" if args.fp16 else "bf16"


def _overrides(args: argparse.Namespace) -> dict[str, Any]:
    """Given fields of TransformerConfig that say how the model is run: fusions, recompute, ...

    Parallel sizes and precision are fields of their own.
    """
    apart = TRANSFORMER_FIELDS | MLA_FIELDS | _PARALLEL_FIELDS | _PRECISION_FIELDS
    apart |= {"rotary_base", "rotary_percent"}
    return {
        name: value
        for name, value in args.explicit.items()
        if name in transformer_fields.load() and name not in apart
    }


def _stated(args: argparse.Namespace) -> dict[str, Any]:
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


def _stated_vocabulary(args: argparse.Namespace) -> int | None:
    """Rows of the embedding as the flags state them; None if they do not."""
    given = args.explicit
    if "padded_vocab_size" in given:
        return int(args.padded_vocab_size)
    if "vocab_size" in given:
        if args.make_vocab_size_divisible_by:
            return padded(args.vocab_size, _vocabulary_multiple(args))
        return int(args.vocab_size)
    return None


def _vocabulary_multiple(args: argparse.Namespace) -> int:
    multiple: int = args.make_vocab_size_divisible_by or _VOCABULARY_MULTIPLE
    return multiple * int(args.tensor_model_parallel_size)
