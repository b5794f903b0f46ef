"""Output folders that appear whole or not at all.

Work is written into a sibling of the final folder, ``<name>.incomplete``, and renamed when it is
finished. A process killed at any moment leaves a complete output or none: the previous one keeps
its name, or gets it back from :func:`recover`, which stages call before they read. Nothing here
imports torch.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from post_training.common import hashing, json_text, regular, threads
from post_training.common.errors import UsageError
from post_training.common.hashing import describe, write_to_disk

_MARK = ".begun"  # in a working folder: a stage made it
FULL = {errno.ENOSPC, errno.EDQUOT}  # a disk, or a user's part of it


def incomplete(target: Path) -> Path:
    """Name under which the output ``target`` is written until it is complete."""
    return sibling(target, ".incomplete")


def begin(target: Path) -> Path:
    """Create an empty working folder for ``target``, discarding what a killed run left."""
    work = incomplete(target)
    for path in work.iterdir() if work.exists() else ():
        if path.name != _MARK:  # which goes last: a kill in between leaves a folder of ours
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    work.mkdir(parents=True, exist_ok=True)
    (work / _MARK).touch()
    return work


def is_begun(work: Path) -> bool:
    """Whether a folder is what :func:`begin` made, or empty."""
    return (work / _MARK).is_file() or not any(work.iterdir())


def publish(target: Path) -> None:
    """Give the finished working folder its final name; a previous ``target`` is replaced whole.

    That takes two renames; in between, the previous output lies where :func:`recover` finds it.
    (Linux can exchange two folders in one step, but not on network file systems.)

    Raises:
        OSError: if a rename fails; the previous output is then where :func:`recover` finds it.
    """
    work = incomplete(target)
    for path in tree(work):
        allow_reading(path)
    for path in (*tree(work), work):
        write_to_disk(path)
    (work / _MARK).unlink(missing_ok=True)
    aside = previous(target)
    if target.exists():
        if aside.exists():
            shutil.rmtree(aside)
        target.rename(aside)
    work.rename(target)
    drop_previous(target)
    write_to_disk(target.parent)


def set_aside(target: Path) -> None:
    """Make room for an output that grows in place: the previous one is kept until it is replaced.

    :func:`drop_previous` deletes it when there is something to take its place. A folder that cannot
    be renamed, such as a container's volume, is emptied.
    """
    if not target.exists():
        return
    if previous(target).exists():
        shutil.rmtree(target)  # of a run that was killed before it had anything
        return
    try:
        target.rename(previous(target))
    except OSError:
        for path in target.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def drop_previous(target: Path) -> None:
    """Delete what :func:`set_aside` kept."""
    if previous(target).exists():
        shutil.rmtree(previous(target))


def recover(target: Path) -> bool:
    """Undo a :func:`publish` that was killed between its two renames. True if it did."""
    aside = previous(target)
    if target.exists() or not aside.exists():
        return False
    aside.rename(target)
    return True


def write_text(path: Path, text: str) -> None:
    """Write a small file atomically: a reader sees the old text or the new one."""
    write_whole(path, lambda work: work.write_text(text, encoding="utf-8"))


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """The same for a file of any kind, which ``write`` makes under another name."""
    work = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(work)
        write_to_disk(work)
        work.replace(path)
    finally:
        work.unlink(missing_ok=True)  # a full disk has no room for a part of it


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
        return json_text.parse(regular.read_text(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
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


_MOST_WORKERS = 8


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def tree(folder: Path) -> Iterator[Path]:
    """All regular files below ``folder``, sorted by path."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return (path for path in paths if path.name != _MARK)


def describe_tree(folder: Path, skip: frozenset[str] = frozenset()) -> list[dict[str, Any]]:
    """Path (relative), size in bytes and XXH3 hash (128 bits) of each file below ``folder``."""
    paths = [path for path in tree(folder) if path.name not in skip]
    return [
        {"file": str(path.relative_to(folder)), **described}
        for path, described in zip(paths, _in_threads(describe, paths), strict=True)
    ]


def changed(
    folder: Path, described: Iterable[Mapping[str, Any]], workers: int = _MOST_WORKERS
) -> list[str]:
    """Those of the files that are missing or not as :func:`describe_tree` described them.

    Older manifests have SHA-256. ``workers`` read at the same time, at most.
    """

    def differs(entry: Mapping[str, Any]) -> bool:
        path = folder / entry["file"]
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            return True
        kind = next((each for each in hashing.KINDS if each in entry), None)
        return kind is not None and hashing.digest(path, kind) != entry[kind]

    entries = list(described)
    found = zip(entries, _in_threads(differs, entries, workers), strict=True)
    return [entry["file"] for entry, is_changed in found if is_changed]


def _in_threads[T, R](
    function: Callable[[T], R], values: Iterable[T], workers: int = _MOST_WORKERS
) -> list[R]:
    with ThreadPoolExecutor(max_workers=min(workers, threads.cores())) as pool:
        return list(pool.map(function, values))


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


def previous(target: Path) -> Path:
    """Where a replaced output lies; hidden: ``<name>.previous`` may be a person's own copy."""
    beside = sibling(target, ".previous")
    return beside.with_name(f".{beside.name}")


def sibling(target: Path, ending: str) -> Path:
    """The path beside ``target`` whose name has ``ending`` appended."""
    # "." and "/" have no name, and that of ".." is of no use.
    target = target if target.name not in ("", "..") else Path(os.path.realpath(target))
    return target.parent / f"{target.name}{ending}"


def allow_reading(path: Path) -> None:
    """Give a file the permissions of the user's umask.

    Some libraries write weights with mode 0600, which a server of another account cannot read.
    """
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(path.stat().st_mode | (0o666 & ~mask))
