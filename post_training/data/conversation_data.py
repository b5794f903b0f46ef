"""Conversations to train on, in which the answers count: read, masked, packed into sequences."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from post_training.common.errors import UsageError
from post_training.data import assistant_mask, packing, sources
from post_training.data.packing import PackedConversations, Packer
from post_training.data.sources import DATASET, TextSource

if TYPE_CHECKING:
    import numpy
    from transformers import PreTrainedTokenizerBase

PARTS = ("train", "valid", "test")
# Held out of every hundred conversations: one to evaluate on while training, one for later.
_HELD_OUT = {49: "valid", 99: "test"}
PROMPTS = "prompts.json"  # of held-out conversations, to measure acceptance with
_MOST_PROMPTS = 64


def check(source: TextSource) -> None:
    """Check the first rows of local data: known fields and roles, an answer in each. No torch.

    Raises:
        UsageError: naming file and line.
    """
    sources.check(source, assistant_mask.require_answers)


def prepare(
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    rows: int,
    folder: Path,
    show_progress: bool = False,
) -> tuple[dict[str, PackedConversations], dict[str, Any]]:
    """Sequences by part (``PARTS``), and what is known about them; a collective call.

    Args:
        source: of the conversations.
        tokenizer: of the target.
        length: of a sequence.
        rows: sequences that are needed; reading from the hub ends there.
        folder: where packed data is kept; a file system that all ranks see.
        show_progress: draw a bar.

    Raises:
        UsageError: on every rank, for data that cannot be trained on.
    """
    parts, content = packing.prepare(
        folder,
        source,
        lambda: packing.fingerprint(source, tokenizer, length, rows),
        lambda: _pack(source, tokenizer, length, rows, show_progress),
        PARTS,
    )
    return parts, {**content, "prompts": str(Path(content.pop("folder")) / PROMPTS)}


def _pack(
    source: TextSource, tokenizer: Any, length: int, rows: int, show_progress: bool
) -> packing.Packed:
    packers = {part: Packer(length) for part in PARTS}
    train = packers["train"]
    conversations = answers = tokens = 0
    prompts: list[list[int]] = []
    with tqdm(total=rows, desc="packing", unit=" sequences", disable=not show_progress) as bar:
        for document, option in sources.documents(source):
            found = assistant_mask.tokenize(document, tokenizer, option)
            before = len(train.full)
            part = _HELD_OUT.get(conversations % 100, "train")
            packers[part].add(found)
            prompt = found.ids[: min(found.mask.index(True), length)]
            if part == "valid" and len(prompts) < _MOST_PROMPTS and prompt:
                prompts.append(prompt)
            conversations += 1
            tokens += len(found.ids)
            answers += sum(found.mask)
            bar.update(len(train.full) - before)
            # A data set on the hub may have millions of rows. A local one is read to its end, so
            # that the data does not depend on the length of the run.
            if len(train.full) >= rows and not source.local:
                break
    for packer in packers.values():
        packer.finish()
    if not train.full:
        raise UsageError(
            f"{DATASET} {source.describe()}",
            f"no answer lies within the first {length} tokens of any conversation"
            if conversations
            else "it holds no conversation",
            "raise --seq-length, or give conversations with shorter prompts",
        )
    description = {
        "source": source.describe(),
        "conversations": conversations,
        "tokens": tokens,
        "answer_tokens": answers,
        "sequences": len(train.full),
        "held_out_sequences": len(packers["valid"].full),
        "sequence_length": length,
        "filled": round(sum(len(row.ids) for row in train.full) / (len(train.full) * length), 4),
        "cut": sum(packer.cut for packer in packers.values()),
        "left_out": sum(packer.dropped for packer in packers.values()),
    }
    parts = {name: packer.arrays() for name, packer in packers.items()}
    return parts, description, {PROMPTS: prompts}


def describe(content: Mapping[str, Any]) -> str:
    """One line for the log."""
    text = (
        f"{content['sequences']:,} sequences x {content['sequence_length']:,} tokens from "
        f"{content['conversations']:,} conversations of {content['source']}; "
        f"{100 * content['answer_tokens'] / max(1, content['tokens']):.0f} % answer tokens, "
        f"{100 * content['filled']:.0f} % filled, {content['held_out_sequences']:,} held out"
    )
    if content["cut"]:
        text += f"; {content['cut']:,} conversations were longer and lost their end"
    if content["left_out"]:
        text += f"; {content['left_out']:,} left out: no answer within a sequence"
    return text


def print_masks(source: TextSource, tokenizer: Any, count: int) -> None:
    """Print the first conversations with the answers marked, each under its place."""
    for document, option in islice(sources.documents(source), count):
        tokens = assistant_mask.tokenize(document, tokenizer, option)
        print(f"-- {document.place}: {sum(tokens.mask)} of {len(tokens.ids)} tokens are answers")
        print(assistant_mask.show(tokens, tokenizer, sys.stdout.isatty()))


def frequencies(samples: Any, vocabulary: int) -> numpy.ndarray[Any, Any]:
    """How often each token is part of an answer in the training data: int64 [vocabulary]."""
    import numpy

    ids, mask = samples.tokens()
    return numpy.bincount(numpy.asarray(ids)[numpy.asarray(mask) > 0], minlength=vocabulary)
