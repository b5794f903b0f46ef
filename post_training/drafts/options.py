"""Flags that describe a draft, shared by the stages that attach one, and eagle3.py's. No torch."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from post_training.checkpoints import torch_dist
from post_training.checkpoints.source import Source, checkpoint_folder
from post_training.common import files, manifest
from post_training.common.errors import UsageError
from post_training.config.checks import at_least
from post_training.config.flags import flag, group, spelled
from post_training.config.options import StageOptions
from post_training.data.options import TrainingTextOptions
from post_training.drafts import registry
from post_training.drafts.eagle3 import draft
from post_training.drafts.eagle3.draft import Draft
from post_training.models.architecture import Architecture
from post_training.training.options import TrainingFlags

# Conversations that drafts are trained on by default.
DATASET = "Magpie-Align/Magpie-Llama-3.1-Pro-MT-300K-Filtered"
# What tensor parallelism divides.
_DIVIDED = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "draft_vocab_size")
_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")


def boolean(text: str) -> bool:
    """``true`` or ``false``, and what else is usual; not Python's ``bool("False")``."""
    if text.lower() in _TRUE + _FALSE:
        return text.lower() in _TRUE
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


@dataclass(frozen=True, kw_only=True)
class DraftOptions:
    TITLE: ClassVar[str] = "draft"

    eagle_config: str | None = flag(
        metavar="FILE",
        help="JSON object with values of the draft that shall differ from the target's",
    )
    mix_hidden_states: bool = flag(
        False,
        nargs="?",
        const=True,
        type=boolean,
        metavar="true|false",
        help="train on a mix of the states of all steps instead of step by step: one step's memory",
    )
    draft_vocab_size: int | None = flag(
        metavar="N",
        help="tokens that the draft proposes: the N most frequent of the training data (all)",
    )
    ttt_steps: int = flag(
        3,
        metavar="N",
        check=at_least(1),
        help="steps that the draft is trained to look ahead (%(default)s)",
    )


@dataclass(frozen=True, kw_only=True)
class Eagle3Options(StageOptions):
    """The flags of eagle3.py."""

    DEFAULTS: ClassVar[Mapping[str, Any]] = {
        "finetune_hf_dataset": DATASET,
        "train_samples": 128_000,
    }

    offline_distillation_data: Path | None = flag(
        metavar="DIR",
        help="train from what extract_features.sh wrote there, without running the target",
    )
    export_offline_model: bool = flag(
        False, help="with --offline-distillation-data: the checkpoint has no layers of the target"
    )
    no_new_draft: bool = flag(
        False, help="refuse a model without a draft, as finetune.sh does, and attach none"
    )
    show_loss_mask: int | None = flag(
        metavar="N",
        check=at_least(1),
        help="show the first N conversations with their answers marked, and exit",
    )
    eval_prompts: int = flag(
        16,
        metavar="N",
        check=at_least(0),
        help="held-out prompts on which evaluations measure the acceptance length (%(default)s)",
    )
    eval_output_len: int = flag(
        48, metavar="N", check=at_least(1), help="tokens each (%(default)s)"
    )
    text: TrainingTextOptions = group(TrainingTextOptions)
    draft: DraftOptions = group(DraftOptions)
    training: TrainingFlags = group(TrainingFlags)


def check_existing(options: Eagle3Options) -> None:
    """Raise UsageError if a draft has to be there, and the checkpoint has none."""
    folder = Path(options.load or "")
    if not options.no_new_draft or (options.dry_run and not folder.exists()):
        return
    if not (manifest.read(folder) or {}).get("draft"):
        raise UsageError(
            f"finetune.sh with --load {folder}",
            "it has no draft, and a model itself is not fine-tuned (SFT, QAT) by this version",
            "distill.sh trains a quantized or pruned model; eagle3.sh attaches a draft and trains "
            "it",
        )


def noting(options: Eagle3Options, source: Source) -> Eagle3Options:
    """``options`` with what there is to say about flags of Megatron-LM's scripts.

    Raises:
        UsageError: if nothing stands for the layers that an offline model lacks.
    """
    if not options.export_offline_model:
        return options
    if not options.offline_distillation_data:
        raise UsageError(
            "--export-offline-model",
            "a model without its layers is trained from stored features, and none are named",
            "give --offline-distillation-data, what extract_features.sh wrote, or leave it out",
        )
    if not source.is_local or ((source.manifest or {}).get("draft") or {}).get("offline"):
        return options
    return options.noting("--export-offline-model: the checkpoint's layers are there, and are kept")


LENGTH = 2048  # tokens of a sequence, or the model's longest text


def sequence_length(options: StageOptions, target: Architecture | None) -> int:
    """``--seq-length``, or what fits the target, as far as that is known."""
    if options.seq_length or target is None:
        return options.seq_length or LENGTH
    return min(LENGTH, target.max_position_embeddings)


NAMES = tuple(field.name for field in fields(DraftOptions))


def plan(
    wanted: DraftOptions,
    options: StageOptions,
    architecture: Architecture,
    *,
    algorithm: str = draft.ALGORITHM,
    offline: bool = False,
) -> Draft:
    """The draft that the flags describe, for this target.

    Raises:
        UsageError: if they contradict each other, describe a draft that cannot work, or one that
            tensor parallelism does not divide.
    """
    overrides: dict[str, Any] = {}
    option = "--eagle-config"
    if wanted.eagle_config:
        remedy = 'name a JSON file such as {"num_hidden_layers": 1}'
        overrides = files.read_json_object(Path(wanted.eagle_config), option, remedy)
        option = f"{option} {wanted.eagle_config}"
    size, tokens = wanted.draft_vocab_size, architecture.vocab_size
    if size is not None:
        what = f"--draft-vocab-size {size}"
        if not 1 <= size <= tokens:
            raise UsageError(what, f"the target has {tokens} tokens", f"1 to {tokens}")
        if overrides.setdefault("draft_vocab_size", size) != size:
            raise UsageError(
                what, f"{option} says {overrides['draft_vocab_size']}", "give one of them"
            )
    config = registry.find(algorithm).configuration(
        architecture, overrides, options.precision, option
    )
    ranks = options.parallel.tensor
    for name in _DIVIDED:
        if config[name] % ranks:
            raise UsageError(
                f"TP={ranks}",
                f"it does not divide the draft's {name}, {config[name]}",
                f"choose a multiple of {ranks} (--eagle-config), or another TP",
            )
    layers = list(config["eagle_aux_hidden_state_layer_ids"])
    mixes, steps = wanted.mix_hidden_states, wanted.ttt_steps
    return Draft(algorithm, config, layers, mixes, steps, offline)


def holds_draft(extra: Path) -> bool:
    """Whether ``--extra-model-path`` means weights of the draft, as it does in Megatron-LM.

    Raises:
        UsageError: for Megatron-LM's own form of them.
    """
    if extra.is_file():
        raise UsageError(
            f"--extra-model-path {extra}",
            "loading a pickled file could run any code",
            "name the checkpoint with the draft that eagle3.sh saved (--draft-model-path)",
        )
    return (extra / torch_dist.TRACKER).is_file()


def trained(
    location: str,
    options: StageOptions,
    architecture: Architecture | None,
    *,
    offline: bool = False,
) -> Draft:
    """The draft of the checkpoint ``--draft-model-path``, if it was made for this target.

    Raises:
        UsageError: if there is none, flags contradict it, or it was made for another target.
    """
    option = f"--draft-model-path {location}"
    checkpoint_folder(Path(location), "--draft-model-path")
    content = manifest.read(Path(location)) or {}
    if not content.get("draft"):
        raise UsageError(option, "its run.json records no draft", "name what eagle3.sh saved")
    given = [name for name in NAMES if name in options.given]
    if given:
        spelling = spelled(given[0])
        raise UsageError(
            f"{spelling} {option}", "the draft is as it was trained", f"leave out {spelling}"
        )
    found = Draft.from_json(content["draft"])
    if architecture is not None:
        wrong = architecture.differences(Architecture.from_json(content["architecture"]))
        if wrong:
            first = wrong[0]
            raise UsageError(
                option,
                f"it was made for another model: {first.name} is {first.theirs!r} there and "
                f"{first.mine!r} here",
                "name the model that the draft was trained for",
            )
    return replace(found, offline=offline)
