"""Writing the features of a model: what it takes, and the shards that are still to write.

The files are those that :mod:`post_training.drafts.features` describes and reads.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from safetensors.torch import save_file
from tqdm import tqdm

from post_training.checkpoints import finite
from post_training.common import files, outputs, report
from post_training.common.errors import UsageError
from post_training.data.packing import PackedConversations
from post_training.distributed.session import Session
from post_training.drafts.algorithm import DraftAlgorithm
from post_training.drafts.eagle3.draft import Draft
from post_training.drafts.features import SETTINGS
from post_training.inference.batching import Batching

logger = logging.getLogger("post_training")


@dataclass(frozen=True)
class Shard:
    """A file of features: its part, its name in the folder, the sequences of the part in it."""

    part: str
    file: str
    rows: list[int]


def plan_shards(data: Mapping[str, PackedConversations], samples: int, size: int) -> list[Shard]:
    """Files of at most ``size`` sequences: 98, 1 and 1 % of ``samples`` in the three parts.

    At least one sequence of each part, as far as there are any.
    """
    held_out = max(1, samples // 100)
    most = {"train": max(1, samples - 2 * held_out), "valid": held_out, "test": held_out}
    shards = []
    for part, limit in most.items():
        count = min(len(data[part]), limit)
        for first in range(0, count, size):
            file = f"{part}/shard-{first // size:05d}.safetensors"
            shards.append(Shard(part, file, list(range(first, min(first + size, count)))))
    return shards


def missing(folder: Path, shards: Sequence[Shard]) -> list[Shard]:
    """The shards that ``folder`` lacks."""
    return [each for each in shards if not (folder / each.file).exists()]


def begin(folder: Path, settings: Mapping[str, Any], overwrite: bool) -> None:
    """Start an extraction in ``folder``, or resume one that ``features.check_folder`` let pass."""
    if overwrite:
        files.set_aside(folder)
    folder.mkdir(parents=True, exist_ok=True)
    before = files.read_json(folder / SETTINGS) or {}
    files.write_json(folder / SETTINGS, {**before, **settings})


def require_same_data(folder: Path, packed: str) -> None:
    """Raise UsageError if the first shards in ``folder`` are of other sequences.

    ``packed`` is the fingerprint of these ones; it is kept for the runs that resume.
    """
    settings = files.read_json_object(folder / SETTINGS, "settings", "give --overwrite")
    if settings.get("packed", packed) != packed:
        raise UsageError(
            f"--output-dir {folder}",
            "the data, or the tokenizer, was changed since the extraction was started there",
            "restore it, name another folder, or give --overwrite",
        )
    files.write_json(folder / SETTINGS, {**settings, "packed": packed})


def check_room(
    folder: Path, shards: Sequence[Shard], length: int, hidden_size: int, draft: Draft, dtype: str
) -> None:
    """Raise UsageError unless the missing shards fit on the disk; log what they take.

    ``length`` is that of a sequence, in tokens.
    """
    count = sum(len(shard.rows) for shard in missing(folder, shards))
    # A token's states, its id (int32) and its mask (uint8).
    states = 1 + len(draft.aux_hidden_state_layer_ids)
    per_token = hidden_size * states * (4 if dtype == "fp32" else 2) + 5
    needed = count * length * per_token
    logger.info(
        "%d sequences to write: %s on disk, %s a token",
        *(count, report.number_of_bytes(needed), report.number_of_bytes(per_token)),
    )
    outputs.disk_space(folder, needed)


@dataclass(frozen=True)
class Extraction:
    """One run of extract_features.py: of ``data`` by part, so many sequences at a time.

    ``model`` is this rank's part, with a draft of ``algorithm`` attached.
    """

    model: Any
    algorithm: DraftAlgorithm
    data: Mapping[str, PackedConversations]
    folder: Path
    batching: Batching
    session: Session

    def write(self, shards: Sequence[Shard]) -> None:
        """Write what is missing, shards in turn over the data-parallel ranks; a collective call."""
        todo = missing(self.folder, shards)
        rank = parallel_state.get_data_parallel_rank()
        ranks = parallel_state.get_data_parallel_world_size()
        length = next(iter(self.data.values())).ids.shape[1]

        def positions(_row: int) -> int:
            return int(length)

        first_of_tensor = parallel_state.get_tensor_model_parallel_rank() == 0
        batching = self.batching
        if parallel_state.get_expert_model_parallel_world_size() > 1:
            # Ranks with different shards meet in every layer: all make as many passes.
            batching = replace(batching, asked=batching.fixed)
        logger.info("%d of %d shards to write", len(todo), len(shards))
        started = time.monotonic()
        with tqdm(total=len(todo), unit="shard", disable=not self.session.show_progress) as bar:
            # Every rank makes as many passes: with experts, all of them meet in every layer.
            for first in range(0, len(todo), ranks):
                mine = todo[min(first + rank, len(todo) - 1)]
                parts = [
                    found
                    for _, found in batching.over(
                        self.model,
                        mine.rows,
                        partial(self._features, mine.part),
                        positions=positions,
                    )
                ]
                if first_of_tensor and first + rank < len(todo):
                    _write_shard(self.folder / mine.file, [part for part in parts if part])
                if not first:
                    self._announce(time.monotonic() - started, todo, ranks)
                bar.update(min(ranks, len(todo) - first))
        if todo:
            logger.info("sequences: %s", batching.describe())

    def _announce(self, seconds: float, todo: Sequence[Shard], ranks: int) -> None:
        """Log how long the shards after the first round will take."""
        done, count = len(todo[0].rows), sum(len(shard.rows) for shard in todo[ranks:])
        if count:
            left = seconds * count / (done * min(ranks, len(todo)))
            said = f"{left / 60:.0f} minutes" if left > 90 else f"{left:.0f} s"
            logger.info("%d shards are left, about %s", len(todo) - ranks, said)

    def _features(self, part: str, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """Features of some sequences on the last pipeline stage, nothing on the others."""
        batch = self.data[part].batch(rows)
        found = self.algorithm.features(self.model, batch["input_ids"].to(self.session.device))
        if found is None:
            return {}
        names = ("the last layer's output", "the auxiliary layers' output")
        bad = finite.describe_not_finite(zip(names, found, strict=True))
        if bad:
            raise UsageError(
                f"features of sequences {rows[0]} to {rows[-1]} ({part})",
                f"{bad}: values overflow in this precision",
                "give --bf16 or --fp32",
            )
        hidden, auxiliary = (each.transpose(0, 1).contiguous().cpu() for each in found)
        return {
            "input_ids": batch["input_ids"].int(),
            "loss_mask": batch["loss_mask"],
            "hidden_states": hidden,
            "aux_hidden_states": auxiliary,
        }


def _write_shard(path: Path, parts: Sequence[Mapping[str, torch.Tensor]]) -> None:
    """Write a shard under another name and rename it: it is whole, or not there."""
    if not parts:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.with_name(f".{path.name}.incomplete")
    save_file({name: torch.cat([part[name] for part in parts]) for name in parts[0]}, work)
    files.allow_reading(work)
    work.replace(path)
