"""What stages have recorded below a folder: the ``run.json`` of outputs, and reports."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from post_training.common import files, manifest
from post_training.common.errors import UsageError
from post_training.reporting import values

_WEIGHTS = (".safetensors", ".distcp")
_LARGEST = 64 << 20  # bytes of a report
_BEGINNING = 1 << 16  # bytes within which a report names its stage
_DEEPEST = 8  # folders below the one that was asked for
_MADE = (".incomplete", ".previous")


@dataclass(frozen=True, eq=False)
class Record:
    """A manifest (of the folder that it lies in) or a report.

    Attributes:
        path: of the JSON file.
        content: as ``manifest.read`` gives it.
    """

    path: Path
    content: Mapping[str, Any]

    @property
    def is_output(self) -> bool:
        """Whether it describes a folder with a model or data, not a measurement."""
        return self.path.name == manifest.FILE

    @property
    def location(self) -> Path:
        return self.path.parent if self.is_output else self.path

    @property
    def stage(self) -> str:
        return values.text(self.content, "stage")

    @property
    def metrics(self) -> Mapping[str, Any]:
        return values.mapping(self.content, "metrics")

    @cached_property
    def sha256(self) -> str:
        return files.sha256(self.path)

    @property
    def inputs(self) -> list[Mapping[str, Any]]:
        found = values.sequence(self.content, "inputs")
        return [each for each in found if isinstance(each, Mapping)]

    @property
    def weight_bytes(self) -> int | None:
        """Of the files that hold weights, optimizer states included; None where there is none."""
        sizes = [
            values.number(each, "bytes") or 0
            for each in values.sequence(self.content, "outputs")
            if values.text(each, "file").endswith(_WEIGHTS)
        ]
        return int(sum(sizes)) if sizes else None


@dataclass(frozen=True)
class Collected:
    """What was found, and why other files were not read."""

    records: list[Record] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def collect(folders: Iterable[Path], deepest: int = _DEEPEST) -> Collected:
    """Every manifest and report below the folders, in the order in which they were finished.

    A file that cannot be read is a problem, and no error: a report is about what there is.
    """
    found = Collected()
    seen: set[Path] = set()
    for path in (each for folder in folders for each in _candidates(folder, deepest)):
        if path.resolve() in seen:
            continue
        seen.add(path.resolve())
        try:
            content = manifest.read(path)
        except (UsageError, OSError) as error:
            cause = f"{error.what}: {error.cause}" if isinstance(error, UsageError) else str(error)
            found.problems.append(cause)
            continue
        if content is not None and values.text(content, "stage"):
            found.records.append(Record(path, content))
        elif path.name == manifest.FILE:
            found.problems.append(f"manifest {path}: it names no stage")
    found.records.sort(key=lambda each: (values.text(each.content, "finished"), str(each.path)))
    return found


def _candidates(top: Path, deepest: int) -> Iterator[Path]:
    """Manifests, and JSON files that may be reports; not within outputs."""
    for name, folders, names in os.walk(top):
        folder = Path(name)
        is_output = manifest.FILE in names
        if is_output:
            yield folder / manifest.FILE
        elif "config.json" not in names:  # a model that no stage made
            yield from (folder / each for each in sorted(names) if _may_be_report(folder / each))
        depth = len(folder.relative_to(top).parts)
        # What lies in an output is a part of it; but a work folder may be one too.
        stays = (is_output and folder != top) or depth >= deepest
        hidden = (each for each in folders if each.startswith(".") or each.endswith(_MADE))
        folders[:] = [] if stays else sorted({*folders} - {*hidden})


def _may_be_report(path: Path) -> bool:
    if path.suffix != ".json" or path.name.startswith("."):
        return False
    try:
        if not path.is_file() or path.stat().st_size > _LARGEST:
            return False
        with path.open("rb") as stream:
            beginning = stream.read(_BEGINNING)
    except OSError:
        return False
    return beginning.lstrip().startswith(b"{") and b'"stage"' in beginning
