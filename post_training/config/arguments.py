"""From a command line to a stage's options. No torch.

The flags themselves are in ``parser.py``; what they state about the model becomes an architecture
in ``model_description.py``.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from post_training.common.errors import UsageError
from post_training.config import flags, other_stages, run_time_flags
from post_training.config.model_description import padded
from post_training.config.options import StageOptions
from post_training.config.parser import make_parser
from post_training.distributed import placement
from post_training.distributed.parallel import Parallel
from post_training.models import transformer_fields
from post_training.models.architecture import MLA_FIELDS, OWN_FIELDS, TRANSFORMER_FIELDS
from post_training.models.builder import BuildOptions

_VOCABULARY_MULTIPLE = 128  # Megatron-LM's default of --make-vocab-size-divisible-by
# Fields of TransformerConfig that have options of their own.
_APART = frozenset(
    """
    tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size
    expert_model_parallel_size expert_tensor_parallel_size sequence_parallel
    bf16 fp16 params_dtype pipeline_dtype
    """.split()
)


def parse[Options: StageOptions](
    stage: str, options: type[Options], argv: Sequence[str] | None = None
) -> Options:
    """The options of ``stage`` that a command line states, by default this process's.

    Each flag is checked by itself; UsageError for an unknown one, or a value that cannot be.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    _require_text([*words, _current_folder()])
    defaults, given = make_parser(stage, options, show_all="--help-all" in words).split(words)
    ignored = given.pop("ignored_flags", [])
    unused = list(dict.fromkeys(given.pop("unused_flags", [])))
    args = argparse.Namespace(**{**defaults, **given})
    vocabulary_multiple = args.tensor_model_parallel_size * (
        args.make_vocab_size_divisible_by or _VOCABULARY_MULTIPLE
    )
    return options(
        stage=stage,
        # run.json records them.
        given={n: str(v) if isinstance(v, Path) else v for n, v in given.items()},
        ignored_flags=tuple(dict.fromkeys(ignored)),
        notices=(other_stages.notice(unused),) if unused else (),
        parallel=_parallel(args),
        precision=_precision(args),
        build=BuildOptions(
            dtype=_precision(args),
            layer_spec="transformer_engine" if args.export_default_te_spec else "modelopt",
            local_attention=args.export_force_local_attention,
            meta_device=args.init_model_with_meta_device,
            overrides=_overrides(given),
        ),
        # As Megatron-LM does: confs of large models carry the flag, also to TP=1.
        sequence_parallel=args.sequence_parallel and args.tensor_model_parallel_size > 1,
        seq_length=args.seq_length,
        stated=_stated(given, vocabulary_multiple),
        vocabulary_multiple=vocabulary_multiple,
        **flags.read(options, args),
    )


def _current_folder() -> str:
    try:
        return str(Path.cwd())
    except OSError as error:
        raise UsageError("the current folder", "it was deleted", "cd to one that exists") from error


def _require_text(words: Sequence[str]) -> None:
    """Raise UsageError for bytes that are no UTF-8: run.json names paths, and cannot hold them."""
    for word in words:
        if not word.isprintable() and any("\udc80" <= letter <= "\udcff" for letter in word):
            shown = os.fsencode(word).decode(errors="backslashreplace")
            raise UsageError(shown, "it is not UTF-8 text", "rename the file or folder")


def _parallel(args: argparse.Namespace) -> Parallel:
    """The parallel sizes, for the number of processes that torchrun or SLURM started.

    Before a launch (``--check``, ``--dry-run``) they are as many as needed, or as are planned.
    """
    planned = os.environ.get("MLM_PLANNED_PROCESSES", "")
    world: int | None = int(planned) if planned.isdecimal() else None
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


def _overrides(given: Mapping[str, Any]) -> dict[str, Any]:
    """Given fields of TransformerConfig that say how the model is run: fusions, recompute, ..."""
    model = {*TRANSFORMER_FIELDS, *MLA_FIELDS, *OWN_FIELDS}
    names = transformer_fields.load().keys() - model - _APART
    found = {name: value for name, value in given.items() if name in names}
    run_time_flags.check(given)
    return found


def _stated(given: Mapping[str, Any], vocabulary_multiple: int) -> dict[str, Any]:
    """What the flags state about the model, by the flat names of ``Architecture.resolved``."""
    names = {*TRANSFORMER_FIELDS, *MLA_FIELDS, *OWN_FIELDS}
    found = {name: value for name, value in given.items() if name in names}
    if given.get("group_query_attention"):
        found.setdefault("num_query_groups", 1)  # as in Megatron-LM
    if given.get("hybrid_layer_pattern"):
        # One letter a layer; | separates pipeline stages, what follows / predicts further tokens.
        # Stages are those of the parallel sizes here, also where a conf was made for others.
        found["hybrid_layer_pattern"] = given["hybrid_layer_pattern"].replace("|", "")
        found.setdefault("num_layers", len(found["hybrid_layer_pattern"].split("/")[0]))
        found["model_type"] = "HybridModel"
    if given.get("untie_embeddings_and_output_weights"):
        found["share_embeddings_and_output_weights"] = False
    if given.get("export_model_type", "GPTModel") != "GPTModel":
        found["model_type"] = "HybridModel"  # which MambaModel was called before
    if "padded_vocab_size" in given:
        found["vocab_size"] = given["padded_vocab_size"]
    elif "vocab_size" in given and given.get("make_vocab_size_divisible_by"):
        found["vocab_size"] = padded(given["vocab_size"], vocabulary_multiple)
    return found
