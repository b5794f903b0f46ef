"""How far a run that goes layer by layer has come, so that the next one goes on after a kill.

Beside the files of an unfinished export lie the hidden states that the next layer gets, and a
record of everything before. They are written while the next layers are computed, as often as that
takes a tenth of the time: a run that goes on repeats the layers since.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from post_training.common import files, hashing, manifest
from post_training.common.errors import UsageError
from post_training.distributed.collectives import from_all_ranks, on_first_rank
from post_training.export import staging
from post_training.export.folder import final_name
from post_training.export.part_files import Written

logger = logging.getLogger("post_training")

_FOLDER = "layers"
_SHARE = 10  # of the time from one record to the next: one part goes into writing it


@dataclass(frozen=True)
class Reached:
    """Where a run goes on.

    Attributes:
        parts: what is written.
        states: hidden states that the next part gets.
        more: what else the run has found.
    """

    parts: list[Written]
    states: list[torch.Tensor]
    more: Mapping[str, Any]


class LayerProgress:
    """The record of one rank. Collective calls, but for :meth:`remove`.

    Args:
        target: of the export.
        key: what decides the result; a record of another one is of no use.
    """

    def __init__(self, target: Path, key: Mapping[str, Any]) -> None:
        self._target, self._key = target, json.loads(json.dumps(key, default=str))
        self.work = files.incomplete(target)
        self._folder = self.work / _FOLDER
        self._rank = torch.distributed.get_rank()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="progress")
        self._job: Future[float] | None = None
        self._last = time.monotonic()

    def find(self) -> Reached | None:
        """Where an earlier run got to; without one the working folder is begun anew."""
        mine = self._records()
        common = set(mine).intersection(*map(set, from_all_ranks(list(mine))))
        for number in sorted(common, reverse=True):
            reached = self._load(mine[number])
            if all(from_all_ranks(reached is not None)):
                self._forget_after(number)
                return reached
        on_first_rank(self._begin)
        return None

    def offer(
        self, parts: Sequence[Written], states: Sequence[torch.Tensor], more: Mapping[str, Any]
    ) -> None:
        """Record how far this is, if it is time to."""
        cost = self._job.result() if self._job is not None and self._job.done() else 0.0
        busy = self._job is not None and not self._job.done()
        due = not busy and time.monotonic() - self._last >= _SHARE * cost
        if all(from_all_ranks(due)):
            copies = [staging.to_host(each) for each in states]
            self._submit(list(parts), copies, more)

    def finish(self, parts: Sequence[Written], more: Mapping[str, Any]) -> None:
        """Record that all parts are there."""
        self._submit(list(parts), [], more)
        if self._job is not None:
            self._job.result()
        self._pool.shutdown()
        from_all_ranks(True)

    def remove(self) -> None:
        """The folder is complete."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _begin(self) -> None:
        files.begin(self._target)
        self._folder.mkdir()

    def _submit(
        self, parts: list[Written], states: list[torch.Tensor], more: Mapping[str, Any]
    ) -> None:
        if self._job is not None:
            self._job.result()
        self._last = time.monotonic()
        self._job = self._pool.submit(self._write, parts, states, more)

    def _write(
        self, parts: list[Written], states: list[torch.Tensor], more: Mapping[str, Any]
    ) -> float:
        """The seconds that it took."""
        started, number = time.monotonic(), len(parts)
        for name in (name for part in parts for name in part.files):
            hashing.describe(self.work / name, again=True)  # waits until it is on the disk
        described = []
        for pass_, each in enumerate(states):
            path = self._folder / f"states-{self._rank}-{number}-{pass_}.safetensors"
            save_file({"states": each}, path)
            hashing.write_to_disk(path)
            described.append({"file": path.name, **hashing.describe(path)})
        content = {
            "key": self._key,
            "parts": [asdict(part) for part in parts],
            "files": [
                {"file": name, **hashing.describe(self.work / name, again=True)}
                for part in parts
                for name in part.files
            ],
            "states": described,
            "more": dict(more),
        }
        files.write_json(self._path(number), manifest.sealed(content))
        # Another rank may not have come that far: the record before stays.
        known = sorted(self._numbers())
        for old in known[: max(0, known.index(number) - 1)]:
            self._delete(old)
        return time.monotonic() - started

    def _path(self, number: int) -> Path:
        return self._folder / f"reached-{self._rank}-{number}.json"

    def _numbers(self) -> list[int]:
        names = self._folder.glob(f"reached-{self._rank}-*.json")
        return [int(path.stem.rpartition("-")[2]) for path in names]

    def _delete(self, number: int) -> None:
        self._path(number).unlink(missing_ok=True)
        for path in self._folder.glob(f"states-{self._rank}-{number}-*"):
            path.unlink()

    def _records(self) -> dict[int, dict[str, Any]]:
        """Those of this rank that are of the same run, by the number of parts."""
        found = {}
        for number in self._numbers():
            try:
                content = files.read_json_object(self._path(number))
            except UsageError:
                continue
            other = [n for n, value in self._key.items() if content.get("key", {}).get(n) != value]
            if manifest.is_sealed(content) and not other:
                found[number] = content
            elif other and self._rank == 0:
                logger.warning(
                    "%s holds a part of another run (%s differs): starting from the first layer",
                    *(self.work, ", ".join(other)),
                )
        return found

    def _load(self, content: Mapping[str, Any]) -> Reached | None:
        """None if files are not as they were recorded."""
        parts = [Written(**each) for each in content["parts"]]
        if self._rank == 0:
            names = [name for part in parts for name in part.files]
            for number, name in enumerate(names, start=1):
                final = self.work / final_name(number, len(names))
                if final.is_file() and not (self.work / name).is_file():
                    final.rename(self.work / name)  # killed while it was completed
            if changed := files.changed(self.work, content["files"]):
                logger.warning("%s is not as it was written: not used", self.work / changed[0])
                return None
        if changed := files.changed(self._folder, content["states"]):
            logger.warning("%s is not as it was written: not used", self._folder / changed[0])
            return None
        paths = [self._folder / each["file"] for each in content["states"]]
        return Reached(parts, [load_file(path)["states"] for path in paths], content["more"])

    def _forget_after(self, number: int) -> None:
        """Delete files of parts that were written after a record, and later records."""

        def files_of_parts() -> None:
            for path in self.work.glob("part-*.safetensors"):
                if int(path.stem.split("-")[1]) >= number:
                    path.unlink()

        on_first_rank(files_of_parts)
        for later in (each for each in self._numbers() if each > number):
            self._delete(later)
