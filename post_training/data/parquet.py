"""Rows of Parquet files, as JSON has them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from post_training.common import limits
from post_training.common.errors import UsageError

_ROWS = 256  # that are read together
_BYTES = 4 << 30  # that they may take


def rows(path: Path, option: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place and values of each row of a file.

    A value that repeats is stored once, so that a file of some kilobytes can stand for any amount:
    256 rows may take 4 GiB.

    Raises:
        UsageError: with ``option``, for what is no Parquet file or takes more.
    """
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            batches = table.iter_batches(batch_size=_ROWS)
            while (values := _next(batches)) is not None:
                for row in values:
                    number += 1
                    yield f"{path}, row {number}", _plain(row)
    except MemoryError as error:
        raise UsageError(
            f"{option} {path}",
            f"{_ROWS} rows from row {number + 1} on: {error}",
            "write it again with the columns that are needed, or give JSONL",
        ) from error
    except pyarrow.ArrowException as error:
        raise UsageError(
            f"{option} {path}",
            f"it is not a readable parquet file: {error}",
            "write it again, or give JSONL",
        ) from error


def _next(batches: Iterator[Any]) -> list[dict[str, Any]] | None:
    with limits.memory(_BYTES):
        batch = next(batches, None)
        return None if batch is None else batch.to_pylist()


def _plain(value: Any) -> Any:
    """The value as JSON has it: times and decimals as text, bytes as text where they are UTF-8.

    Other bytes stay what they are: an image is no text, and what asks for text refuses it.
    """
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, bytes):
        with contextlib.suppress(UnicodeDecodeError):
            return value.decode()
        return value
    return value if value is None or isinstance(value, str | bool | int | float) else str(value)
