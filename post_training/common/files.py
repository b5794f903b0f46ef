"""Output folders that appear whole or not at all.

Work is written into a sibling of the final folder, ``<name>.incomplete``, and renamed when it is
finished. A process killed at any moment leaves a complete output or none: the previous one keeps
its name, or gets it back from :func:`recover`, which stages call before they read. Nothing here
imports torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from post_training.common import threads
from post_training.common.errors import UsageError


def incomplete(target: Path) -> Path:
    """Name under which the output ``target`` is written until it is complete."""
    return sibling(target, ".incomplete")


def begin(target: Path) -> Path:
    """Create an empty working folder for ``target``, discarding what a killed run left."""
    work = incomplete(target)
    if work.exists():
        shutil.rmtree(work)
    work.mkdir(parents=True)
    return work


def publish(target: Path) -> None:
    """Give the finished working folder its final name; a previous ``target`` is replaced whole.

    That takes two renames; in between, the previous output lies at ``<name>.previous``, where
    :func:`recover` finds it. (Linux can exchange two folders in one step, but not on the network
    file systems on which outputs usually lie.)

    Raises:
        OSError: if a rename fails; the previous output is then where :func:`recover` finds it.
    """
    work = incomplete(target)
    _allow_reading(work)
    for path in (*tree(work), work):
        _sync(path)
    previous = _previous(target)
    if target.exists():
        if previous.exists():
            shutil.rmtree(previous)
        target.rename(previous)
    work.rename(target)
    if previous.exists():
        shutil.rmtree(previous)
    _sync(target.parent)


def recover(target: Path) -> bool:
    """Undo a :func:`publish` that was killed between its two renames. True if it did."""
    previous = _previous(target)
    if target.exists() or not previous.exists():
        return False
    previous.rename(target)
    return True


def write_text(path: Path, text: str) -> None:
    """Write a small file atomically: a reader sees the old text or the new one."""
    work = path.with_name(f".{path.name}.{os.getpid()}")
    with work.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    work.replace(path)


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as indented JSON, atomically (see :func:`write_text`)."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


_AGAIN = "copy or download it again"


def read_json(path: Path, what: str = "file", remedy: str = _AGAIN) -> Any | None:
    """Content of a JSON file; None where there is no such file.

    Args:
        path: of the file.
        what: the file is, in a message.
        remedy: in a message.

    Raises:
        UsageError: if it cannot be read, or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UsageError(f"{what} {path}", f"it cannot be read as JSON: {error}", remedy) from error


def read_json_object(path: Path, what: str = "file", remedy: str = _AGAIN) -> dict[str, Any]:
    """Content of a JSON file that must be there and hold an object; otherwise as :func:`read_json`.

    Raises:
        UsageError: if it is missing, cannot be read, is not JSON, or no object.
    """
    content = read_json(path, what, remedy)
    if content is None and not path.is_file():
        raise UsageError(f"{what} {path}", "there is no such file", remedy)
    if not isinstance(content, dict):
        raise UsageError(f"{what} {path}", "it is no JSON object", remedy)
    return content


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def tree(folder: Path) -> Iterator[Path]:
    """All regular files below ``folder``, sorted by path."""
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def describe_tree(folder: Path, skip: frozenset[str] = frozenset()) -> list[dict[str, Any]]:
    """Path (relative), size in bytes and SHA-256 of each file below ``folder``.

    ``hashlib`` releases the interpreter lock, so threads read a large checkpoint at disk speed.
    """
    paths = [path for path in tree(folder) if path.name not in skip]
    with ThreadPoolExecutor(max_workers=min(8, threads.cores())) as pool:
        hashes = list(pool.map(sha256, paths))
    return [
        {"file": str(path.relative_to(folder)), "bytes": path.stat().st_size, "sha256": digest}
        for path, digest in zip(paths, hashes, strict=True)
    ]


def listing_sha256(folder: Path) -> str:
    """Hash of the names, sizes and times of all files below ``folder``: cheap to compute."""
    digest = hashlib.sha256()
    for path in tree(folder):
        status = path.stat()
        digest.update(
            f"{path.relative_to(folder)}\0{status.st_size}\0{status.st_mtime_ns}\n".encode()
        )
    return digest.hexdigest()


def size_of(folder: Path) -> int:
    """Bytes of all files below ``folder``."""
    return sum(path.stat().st_size for path in tree(folder))


def _previous(target: Path) -> Path:
    return sibling(target, ".previous")


def sibling(target: Path, ending: str) -> Path:
    """The path beside ``target`` whose name has ``ending`` appended."""
    # "." and "/" have no name, which with_name refuses.
    target = target if target.name else target.absolute()
    return target.parent / f"{target.name}{ending}"


def _allow_reading(folder: Path) -> None:
    """Give every file the permissions of the user's umask.

    Some libraries write weights with mode 0600, which a server of another account cannot read.
    """
    mask = os.umask(0)
    os.umask(mask)
    for path in tree(folder):
        path.chmod(path.stat().st_mode | (0o666 & ~mask))


def _sync(path: Path) -> None:
    """Write a file or a folder's list of names to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
