"""Rows of data files: JSONL, parquet, CSV and plain text, and of data sets on the hub.

Every row carries its place (``path, line 3``), so that a later error can name it. Nothing here
imports torch: checks before the work use it.
"""

from __future__ import annotations

import csv
import json
import logging
import os
import re
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse

from post_training.common import inputs, json_text, regular
from post_training.common.errors import UsageError, first_line
from post_training.data import parquet

csv.field_size_limit(1 << 30)  # Python's own limit is 131,072 characters
logger = logging.getLogger("post_training")
SUFFIXES = (".jsonl", ".parquet", ".csv", ".txt")


class Row(NamedTuple):
    """One record and where it comes from, such as ``/data/a.jsonl, line 3``."""

    place: str
    values: dict[str, Any]


def is_local(source: str) -> bool:
    """Whether ``source`` means a path rather than a name on the hub (``org/name`` or ``name``).

    Anything that exists is a path. So is what cannot be a hub name: absolute or relative by its
    first character, deeper than one folder, or with the suffix of a data file.
    """
    path = inputs.expanded(source)
    return (
        path.exists()
        or source.startswith(("/", ".", "~"))
        or source.count("/") > 1
        or path.suffix.lower() in SUFFIXES
    )


def list_files(path: Path, option: str) -> list[Path]:
    """The data files of ``path``: itself, or those below the folder, sorted, hidden ones skipped.

    Raises:
        UsageError: if there is none.
    """
    what = f"{option} {path}"
    if not path.exists():
        raise UsageError(
            what,
            "there is no such file or folder",
            "give a path that exists, or the name of a data set on the hub (org/name)",
        )
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise UsageError(
                what,
                f"the suffix {path.suffix or '(none)'} names no known format",
                f"give one of {', '.join(SUFFIXES)}",
            )
        return [path]
    shown = [
        each
        for each in sorted(path.rglob("*"))
        if each.is_file() and not any(part.startswith(".") for part in each.relative_to(path).parts)
    ]
    found = [each for each in shown if each.suffix.lower() in SUFFIXES]
    if not found:
        raise UsageError(
            what, f"the folder holds no file of {', '.join(SUFFIXES)}", "give a folder with data"
        )
    if others := sorted({each.name for each in shown} - {each.name for each in found}):
        names = ", ".join(others[:3])
        logger.info("%s: files that are not read: %d (%s ...)", what, len(others), names)
    for begin, count in _parts_missing(found).items():
        logger.warning("%s: of the parts of %s, %d are missing", what, begin, count)
    return found


def _parts_missing(paths: Sequence[Path]) -> dict[str, int]:
    """Of files that say that they are several (``train-00000-of-00002``): how many are missing."""
    parts: dict[tuple[str, int], int] = {}
    for path in paths:
        if named := re.fullmatch(r"(.+)-\d+-of-(\d+)", path.stem):
            key = (str(path.with_name(named[1])), int(named[2]))
            parts[key] = parts.get(key, 0) + 1
    return {begin: of - count for (begin, of), count in parts.items() if of > count}


def local_rows(source: str, option: str) -> Iterator[Row]:
    """Rows of a file, or of all files of a folder.

    Raises:
        UsageError: as :func:`list_files` and :func:`read`.
    """
    for path in list_files(inputs.expanded(source), option):
        yield from read(path, option)


def read(path: Path, option: str) -> Iterator[Row]:
    """Rows of one file, read lazily. A ``.txt`` file is one row with the key ``text``.

    Args:
        path: a file with one of :data:`SUFFIXES`.
        option: the flag that named it, for errors.

    Raises:
        UsageError: malformed content, with the line or row.
    """
    readers = {".jsonl": _jsonl, ".parquet": _parquet, ".csv": _csv, ".txt": _text}
    try:
        yield from readers[path.suffix.lower()](path, option)
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{option} {path}", f"it is not UTF-8 text: {error}", "convert the file to UTF-8"
        ) from error
    except (OSError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UsageError(
            f"{option} {path}", f"it cannot be read: {reason}", "give a readable file"
        ) from error


def _jsonl(path: Path, option: str) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(regular.lines(stream), start=1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                values = json_text.parse(line)
            except json_text.HalfCharacterError as error:
                remedy = "write the character whole, or delete what is left of it"
                raise UsageError(f"{option} {place}", str(error), remedy) from error
            except (ValueError, RecursionError) as error:
                reason = str(error)
                if isinstance(error, json.JSONDecodeError):
                    reason = f"{error.msg} at column {error.colno}"
                raise UsageError(
                    f"{option} {place}",
                    f"it is not JSON: {reason}",
                    "write one JSON object on each line",
                ) from error
            if not isinstance(values, dict):
                raise UsageError(
                    f"{option} {place}",
                    f"it is a JSON {type(values).__name__}, not an object",
                    'write one JSON object on each line, such as {"text": "..."}',
                )
            yield Row(place, values)


def _parquet(path: Path, option: str) -> Iterator[Row]:
    yield from (Row(*row) for row in parquet.rows(path, option))


def _csv(path: Path, option: str) -> Iterator[Row]:
    """Rows keyed by the header; callers that know a headerless layout use :func:`csv_lines`."""
    lines = csv_lines(path, option)
    header = next(lines, None)
    if header is None:
        return
    names = [name.strip() for name in header[1]]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        cause = f"its header has {twice[0]!r} twice"
        raise UsageError(f"{option} {header[0]}", cause, "give each column a name of its own")
    for place, fields in lines:
        if len(fields) != len(names):
            raise UsageError(
                f"{option} {place}",
                f"it has {len(fields)} fields, the header has {len(names)}",
                "quote fields that hold commas or line breaks",
            )
        yield Row(place, dict(zip(names, fields, strict=True)))


def csv_lines(path: Path, option: str) -> Iterator[tuple[str, list[str]]]:
    """Place and fields of each CSV record, including a header."""
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(regular.lines(stream), strict=True)
        try:
            for fields in reader:
                if fields:
                    yield f"{path}, line {reader.line_num}", fields
        except csv.Error as error:
            raise UsageError(
                f"{option} {path}, line {reader.line_num}",
                f"it is not CSV: {error}",
                "quote fields that hold commas, quotes or line breaks",
            ) from error


def _text(path: Path, option: str) -> Iterator[Row]:
    text = path.read_text(encoding="utf-8-sig")
    if text.strip():
        yield Row(str(path), {"text": text})


def hub_rows(
    name: str,
    option: str,
    *,
    configuration: str | None = None,
    files: Sequence[str] = (),
    split: str | None = None,
    stream: bool = True,
) -> Iterator[Row]:
    """Rows of one split of a data set on the hub, or of some of its files.

    Args:
        name: ``org/name``.
        option: the flag that named it, for errors.
        configuration: the data set's configuration (subset), where it has several.
        files: paths in the data set.
        split: by default ``train``, else the data set's first.
        stream: read rows lazily instead of downloading the split first.

    Raises:
        UsageError: if the hub cannot be reached, or has no such data set, configuration or split.
    """
    import datasets

    _require_hub(name, option)
    try:
        if files:
            split = "train"
        elif split is None:
            splits = datasets.get_dataset_split_names(name)
            split = "train" if "train" in splits else splits[0]
        rows = datasets.load_dataset(
            name, configuration, data_files=list(files) or None, split=split, streaming=stream
        )
        for number, values in enumerate(rows, start=1):
            yield Row(f"{name} ({', '.join(files) or split}), row {number}", dict(values))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise _hub_error(name, option, first_line(error)) from error


def _require_hub(name: str, option: str) -> None:
    """Fail at once if the hub's host has no address and the data set was never downloaded.

    The hub's client retries for 23 s before it fails. Behind a proxy, the proxy resolves names.
    """
    import datasets

    host = urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
    proxied = any(os.environ.get(key) for key in ("https_proxy", "HTTPS_PROXY", "ALL_PROXY"))
    cached = Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")
    if proxied or cached.exists() or host is None:
        return
    try:
        socket.getaddrinfo(host, 443)
    except OSError as error:
        raise _hub_error(name, option, f"{host} cannot be reached: {error.strerror}") from error


def _hub_error(name: str, option: str, cause: str) -> UsageError:
    return UsageError(
        f"{option} {name}",
        f"it is no local path, and loading it from the hub failed: {cause}",
        f"check the name and the network (gated sets need HF_TOKEN), or give a local file or "
        f"folder instead: {option} PATH with {', '.join(SUFFIXES)}",
    )
