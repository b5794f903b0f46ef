"""Flags that describe a draft, shared by the stages that attach one. No torch."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from post_training.checkpoints import folders
from post_training.common import manifest
from post_training.common.errors import UsageError
from post_training.config import arguments
from post_training.drafts.eagle3 import draft
from post_training.drafts.eagle3.draft import Draft
from post_training.models.architecture import Architecture

NAMES = ("eagle_config", "mix_hidden_states", "draft_vocab_size", "ttt_steps")
_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")


def add(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``NAMES`` to a stage's parser."""
    group = parser.add_argument_group("draft")
    group.add_argument(
        "--eagle-config",
        metavar="FILE",
        help="JSON object with values of the draft that shall differ from the target's",
    )
    group.add_argument(
        "--mix-hidden-states",
        nargs="?",
        const=True,
        default=False,
        type=boolean,
        metavar="true|false",
        help="train on a mix of the states of all steps instead of step by step: one step's memory",
    )
    group.add_argument(
        "--draft-vocab-size",
        type=int,
        metavar="N",
        help="tokens that the draft proposes: the N most frequent of the training data (all)",
    )
    group.add_argument(
        "--ttt-steps",
        type=int,
        default=3,
        metavar="N",
        help="steps that the draft is trained to look ahead (%(default)s)",
    )


def boolean(text: str) -> bool:
    """``true`` or ``false``, and what else is usual; not Python's ``bool("False")``."""
    if text.lower() in _TRUE + _FALSE:
        return text.lower() in _TRUE
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def plan(args: argparse.Namespace, architecture: Architecture, offline: bool = False) -> Draft:
    """The draft that the flags describe, for this target.

    Raises:
        UsageError: as :func:`post_training.drafts.eagle3.draft.plan`; for a number below 1 too.
    """
    if args.ttt_steps < 1:
        raise UsageError(f"--ttt-steps {args.ttt_steps}", "a draft looks ahead", "1 or more")
    overrides: dict[str, Any] = {}
    option = "--eagle-config"
    if args.eagle_config:
        overrides = draft.read_overrides(args.eagle_config)
        option = f"--eagle-config {args.eagle_config}"
    if args.draft_vocab_size is not None:
        size, tokens = args.draft_vocab_size, architecture.vocab_size
        if not 1 <= size <= tokens:
            raise UsageError(
                f"--draft-vocab-size {size}", f"the target has {tokens} tokens", f"1 to {tokens}"
            )
        if overrides.get("draft_vocab_size", size) != size:
            raise UsageError(
                f"--draft-vocab-size {size}",
                f"{option} says {overrides['draft_vocab_size']}",
                "give one of them",
            )
        overrides["draft_vocab_size"] = size
    made = draft.plan(
        architecture,
        overrides,
        dtype=arguments.precision(args),
        mix_hidden_states=args.mix_hidden_states,
        ttt_steps=args.ttt_steps,
        offline=offline,
        option=option,
    )
    _check_division(made, args.tensor_model_parallel_size)
    return made


def _check_division(made: Draft, ranks: int) -> None:
    """Raise UsageError unless tensor parallelism divides the draft."""
    for name in (
        "num_attention_heads",
        "num_key_value_heads",
        "intermediate_size",
        "draft_vocab_size",
    ):
        if made.config[name] % ranks:
            raise UsageError(
                f"TP={ranks}",
                f"it does not divide the draft's {name}, {made.config[name]}",
                f"choose a multiple of {ranks} (--eagle-config), or another TP",
            )


def trained(location: str, args: argparse.Namespace, architecture: Architecture | None) -> Draft:
    """The draft of the checkpoint ``--draft-model-path``, if it was made for this target.

    Raises:
        UsageError: if there is none, flags contradict it, or it was made for another target.
    """
    option = f"--draft-model-path {location}"
    folders.checkpoint_folder(Path(location), "--draft-model-path")
    content = manifest.read(Path(location)) or {}
    if not content.get("draft"):
        raise UsageError(option, "its run.json records no draft", "name what eagle3.sh saved")
    given = [name for name in NAMES if name in args.explicit]
    if given:
        flag = "--" + given[0].replace("_", "-")
        raise UsageError(f"{flag} {option}", "the draft is as it was trained", f"leave out {flag}")
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
    return replace(found)
