"""Writing the features of a model: where they may go, what it takes, the shards to write."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from post_training.checkpoints import finite
from post_training.common import files, manifest, outputs
from post_training.common.errors import UsageError
from post_training.data.packing import PackedConversations
from post_training.drafts import features
from post_training.drafts.algorithm import DraftAlgorithm
from post_training.drafts.eagle3.draft import Draft
from post_training.drafts.features import Shard

if TYPE_CHECKING:
    import torch

    from post_training.distributed.session import Session

logger = logging.getLogger("post_training")

SETTINGS = "settings.json"  # what must not change between the runs of an extraction


def check_folder(folder: Path, settings: Mapping[str, Any] | None) -> None:
    """Raise UsageError unless a folder is empty or holds an unfinished extraction like this one.

    Args:
        settings: what must not change between the runs of an extraction; None if not known yet.
    """
    what = f"--output-dir {folder}"
    content = manifest.read(folder)
    if content is not None:
        raise UsageError(
            what,
            f"it holds the output of {content.get('stage')}, finished {content.get('finished')}",
            "name another folder, or give --overwrite",
        )
    before = files.read_json(folder / SETTINGS)
    if before is None and any(folder.iterdir()):
        raise UsageError(what, "it is not empty and no extraction", "name another folder")
    if before is not None and settings is not None:
        changed = [name for name in settings if settings[name] != before.get(name)]
        if changed:
            raise UsageError(
                what,
                f"an extraction with another {', '.join(changed)} was started there",
                "use the same settings, name another folder, or give --overwrite",
            )


class Extraction:
    """One run of extract_features.py.

    Args:
        model: this rank's part, with a draft attached.
        algorithm: of the draft.
        data: packed conversations by part.
        folder: where the shards go.
        batch: sequences that a rank computes at a time.
        session: the process's.
    """

    def __init__(
        self,
        model: Any,
        algorithm: DraftAlgorithm,
        data: Mapping[str, PackedConversations],
        folder: Path,
        batch: int,
        session: Session,
    ) -> None:
        self._model = model
        self._algorithm = algorithm
        self._data = data
        self._folder = folder
        self._batch = batch
        self._session = session

    def announce(self, shards: Sequence[Shard], length: int, draft: Draft, dtype: str) -> None:
        """Log what is still to do, with the disk and time that it takes; check the disk's room."""
        todo = self._missing(shards)
        count = sum(len(shard.rows) for shard in todo)
        if not count:
            logger.info("all %d shards are there already", len(shards))
            return
        per_token = features.bytes_per_token(
            self._model.config.hidden_size, len(draft.aux_hidden_state_layer_ids), dtype
        )
        needed = count * length * per_token
        probe = todo[0].rows[: self._batch]
        self._features(todo[0].part, probe)  # the first pass also sets things up
        started = time.monotonic()
        self._features(todo[0].part, probe)
        seconds = (time.monotonic() - started) / len(probe) * count / self._session.parallel.data
        logger.info(
            "%d of %d shards to write: %d sequences, %.2f GB on disk (%.1f kB a token), about %s",
            len(todo),
            len(shards),
            count,
            needed / 1e9,
            per_token / 1e3,
            f"{seconds / 60:.0f} minutes" if seconds > 90 else f"{seconds:.0f} s",
        )
        outputs.disk_space(self._folder, needed)

    def write(self, shards: Sequence[Shard]) -> None:
        """Write what is missing, shards in turn over the data-parallel ranks; a collective call."""
        from megatron.core import parallel_state

        todo = self._missing(shards)
        rank = parallel_state.get_data_parallel_rank()
        ranks = parallel_state.get_data_parallel_world_size()
        first_of_tensor = parallel_state.get_tensor_model_parallel_rank() == 0
        writes = first_of_tensor and self._model.post_process
        with tqdm(total=len(todo), unit="shard", disable=not self._session.show_progress) as bar:
            # Every rank makes as many passes: with experts, all of them meet in every layer.
            for first in range(0, len(todo), ranks):
                mine = todo[min(first + rank, len(todo) - 1)]
                parts = [
                    self._features(mine.part, mine.rows[start : start + self._batch])
                    for start in range(0, len(mine.rows), self._batch)
                ]
                if writes and first + rank < len(todo):
                    features.write_shard(self._folder / mine.file, parts)
                bar.update(min(ranks, len(todo) - first))

    def _missing(self, shards: Sequence[Shard]) -> list[Shard]:
        return [each for each in shards if not (self._folder / each.file).exists()]

    def _features(self, part: str, rows: list[int]) -> dict[str, torch.Tensor] | None:
        """Features of some sequences on the last pipeline stage, None on the others."""
        batch = self._data[part].batch(rows)
        found = self._algorithm.features(self._model, batch["input_ids"].to(self._session.device))
        if found is None:
            return None
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
