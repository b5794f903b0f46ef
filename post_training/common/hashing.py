"""Hashes of files for manifests; those of an output's parts may be computed while others are made.

XXH3 is as fast as memory; a manifest is no signature, so it need not withstand an attacker. Older
manifests have SHA-256.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

_BLOCK = 1 << 22
KINDS: dict[str, Callable[[], Any]] = {"xxh3_128": xxhash.xxh3_128, "sha256": hashlib.sha256}

_pool: ThreadPoolExecutor | None = None
# By what a file is, whatever its name: outputs are renamed when they are complete.
_ahead: dict[tuple[int, int, int, int], Future[dict[str, Any]]] = {}


def digest(path: Path, kind: str) -> str:
    """Hexadecimal hash of a file."""
    with path.open("rb", buffering=0) as stream:
        # Both hashes release the interpreter lock for blocks of this size.
        found = KINDS[kind]()
        block = memoryview(bytearray(_BLOCK))
        while count := stream.readinto(block):
            found.update(block[:count])
    return str(found.hexdigest())


def describe(path: Path, *, again: bool = False) -> dict[str, Any]:
    """Size in bytes and XXH3 hash of a file.

    Args:
        again: it will be asked for once more, of a file that changes no more.
    """
    identity = _identity(path)
    if again and identity not in _ahead:
        describe_ahead(path)
    started = _ahead.get(identity) if again else _ahead.pop(identity, None)
    if started is not None and started.exception() is None:
        return dict(started.result())
    return _describe(path)


def describe_ahead(path: Path) -> None:
    """Write a finished file to the disk and hash it, beside what this thread goes on to do.

    For a file that changes no more; :func:`describe` then waits for that.
    """
    global _pool
    _pool = _pool or ThreadPoolExecutor(2, thread_name_prefix="hashing")
    _ahead[_identity(path)] = _pool.submit(_written, path)


def write_to_disk(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _written(path: Path) -> dict[str, Any]:
    found = _describe(path)
    write_to_disk(path)
    return found


def _describe(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "xxh3_128": digest(path, "xxh3_128")}


def _identity(path: Path) -> tuple[int, int, int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
