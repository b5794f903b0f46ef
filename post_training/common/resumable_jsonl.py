"""A JSONL file that grows over a long run, survives a kill, and gets its name when complete.

Rows are appended to ``<name>.incomplete``; ``<name>.incomplete.json`` says how many bytes of it
count and with which settings they were made. The next run cuts off what a killed run wrote after
its last record there, and resumes from that record. Nothing here imports torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypedDict

from annotated_types import Ge

from post_training.common import files, forms, hashing, manifest, outputs
from post_training.common.errors import UsageError


class _Progress(TypedDict):
    settings: dict[str, Any]
    done: int
    rows: int
    bytes: Annotated[int, Ge(0)]
    totals: dict[str, float]


def state_path(target: Path) -> Path:
    """Where the progress of ``target`` is recorded."""
    return target.with_name(target.name + ".incomplete.json")


def manifest_path(target: Path) -> Path:
    """The manifest of a finished file: ``<name>.run.json``."""
    return target.with_name(f"{target.name}.{manifest.FILE}")


def check(
    target: Path, settings: Mapping[str, Any], *, overwrite: bool, later: Collection[str] = ()
) -> None:
    """Check that ``target`` can be written, and that rows of a killed run fit ``settings``.

    Args:
        later: names of settings that are not known yet, and checked by another call.

    Raises:
        UsageError: if it exists, its folder cannot be written, or the left rows were made with
            other settings and ``overwrite`` is not given.
    """
    what = f"output {target}"
    if target.is_dir():
        raise UsageError(what, "it is a folder", "name a file, such as answers.jsonl")
    if target.exists() and not overwrite:
        made = ""
        if manifest_path(target).is_file():
            content = files.read_json_object(manifest_path(target), "manifest")
            made = f", complete, made by: {content.get('command')}"
        raise UsageError(
            what,
            f"it exists{made}",
            "delete it, name another, or give --overwrite (MLM_EXTRA_ARGS=--overwrite)",
        )
    if target.exists() and not manifest_path(target).is_file():
        raise UsageError(what, "it exists, and no stage made it", "name another file")
    outputs.writable(target)
    rows = files.incomplete(target)
    # A run leaves rows with their record, or none yet.
    if rows.exists() and rows.stat().st_size and not state_path(target).is_file():
        raise UsageError(
            what, f"{rows}, where its rows are collected, is of no run", "move that away"
        )
    state = _read_state(target)
    if state is None or overwrite:
        return
    found = state["settings"]
    compared = [name for name in {**found, **settings} if name not in later]
    wrong = [name for name in compared if found.get(name) != settings.get(name)]
    if wrong:
        shown = "; ".join(
            f"{name} was {found.get(name)} and is {settings.get(name)}" for name in wrong
        )
        raise UsageError(
            what,
            f"an interrupted run left {state['rows']} rows that were made otherwise: {shown}",
            "give the same settings to resume, or --overwrite to start over",
        )


class Rows:
    """The file while it grows. One process writes; :func:`check` has passed.

    Attributes:
        done: units of work, defined by the caller, that the rows so far cover.
        totals: sums over all runs, defined by the caller.
        rows: rows so far.
    """

    def __init__(self, target: Path, settings: Mapping[str, Any]) -> None:
        self.target = target
        self.settings = json.loads(json.dumps(dict(settings)))
        self.done = 0
        self.rows = 0
        self.totals: dict[str, float] = {}
        target.parent.mkdir(parents=True, exist_ok=True)
        state = _read_state(target)
        if state is not None and state["settings"] == self.settings:
            self.done, self.rows, self.totals = state["done"], state["rows"], state["totals"]
            os.truncate(files.incomplete(target), state["bytes"])
        else:
            files.incomplete(target).write_bytes(b"")
            self._record()

    def append(
        self, rows: Iterable[Mapping[str, Any]], *, done: int, totals: Mapping[str, float]
    ) -> None:
        """Write ``rows`` to disk, then the record that counts them."""
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        with files.incomplete(self.target).open("a", encoding="utf-8") as stream:
            stream.writelines(lines)
            stream.flush()
            os.fsync(stream.fileno())
        self.done += done
        self.rows += len(lines)
        for name, value in totals.items():
            self.totals[name] = self.totals.get(name, 0) + value
        self._record()

    def finish(self, record: manifest.Manifest) -> dict[str, Any]:
        """Rename the complete file and write its manifest. Returns the manifest's content."""
        work = files.incomplete(self.target)
        content = record.content([{"file": self.target.name, **hashing.describe(work)}])
        # A run that is killed in between must not leave an earlier file with the new manifest.
        self.target.unlink(missing_ok=True)
        files.write_json(manifest_path(self.target), content)
        work.replace(self.target)
        state_path(self.target).unlink()
        return content

    def _record(self) -> None:
        files.write_json(
            state_path(self.target),
            {
                "settings": self.settings,
                "done": self.done,
                "rows": self.rows,
                "bytes": files.incomplete(self.target).stat().st_size,
                "totals": self.totals,
            },
        )


def _read_state(target: Path) -> _Progress | None:
    """The record of an interrupted run; None without one, or if its rows are gone."""
    path, rows = state_path(target), files.incomplete(target)
    if not (path.is_file() and rows.is_file()):
        return None
    what, remedy = "progress of an interrupted run", "delete it to start over"
    state: _Progress = forms.read_json(path, _Progress, what, remedy)
    return state if rows.stat().st_size >= state["bytes"] else None
