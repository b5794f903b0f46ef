"""One run at a time makes an output. No torch.

:func:`hold` locks ``<name>.lock`` beside the output for as long as the process lives: the kernel,
or the NFS server, releases the lock of a process or machine that is gone, so a lock file that a
killed run left stops nobody. Where the file system has no locks (some NFS and Lustre mounts), the
file itself is the lock; it names the run, and one whose process is gone from this machine counts
as left over.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import stat
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from post_training.common import files
from post_training.common.errors import UsageError

# A link could lead to anything; a pipe would wait.
_NO_LINK = os.O_NOFOLLOW | os.O_NONBLOCK
_TAKEN = {errno.EACCES, errno.EAGAIN}
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


@contextlib.contextmanager
def hold(target: Path, command: str) -> Iterator[None]:
    """Keep other runs away from the output ``target``, a file or a folder, while in the block.

    Args:
        target: its parents are created.
        command: what runs, for the message of the run that is refused.

    Raises:
        UsageError: if another run holds it, by host, process, start and command; if nothing can
            be made beside it.
    """
    path = _path(target)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _take(path, target)
    except OSError as error:
        if error.errno in files.FULL:
            raise
        cause = f"{path} cannot be made: {error.strerror}"
        raise UsageError(f"output {target}", cause, "name another place") from error
    content = {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "since": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": command,
    }
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, (json.dumps(content) + "\n").encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def check(target: Path) -> None:
    """Raise UsageError if another run is making ``target`` now. Creates nothing."""
    path = _path(target)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | _NO_LINK)
    except OSError as error:
        if os.path.lexists(path):
            cause = f"{path}, which keeps other runs away, cannot be opened: {error.strerror}"
            raise UsageError(f"output {target}", cause, "name another place") from error
        return  # no run, or a path that other checks refuse
    try:
        _lock(descriptor, target, path, exists=True)
    finally:
        os.close(descriptor)


def _path(target: Path) -> Path:
    """Beside the output; inside one that grows where nothing can be written beside it: a volume."""
    beside = files.sibling(target, ".lock")
    if target.is_dir() and not os.access(beside.parent, os.W_OK | os.X_OK):
        return target / ".lock"
    return beside


def _take(path: Path, target: Path) -> int:
    """The descriptor of the locked file."""
    while True:
        try:
            descriptor, exists = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL), False
        except FileExistsError:
            try:
                descriptor, exists = os.open(path, os.O_RDWR | _NO_LINK), True
            except FileNotFoundError:
                continue  # its holder has just ended
        try:
            _lock(descriptor, target, path, exists=exists)
            # A holder that ends removes the file: then this lock is of a file without a name.
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int, target: Path, path: Path, *, exists: bool) -> None:
    """Lock an open file. A process's lock, not a descriptor's: a forked helper does not keep it."""
    if exists:
        _require_own(descriptor, target, path)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _TAKEN:
            raise _refusal(target, _read(descriptor), "wait for it or stop it") from None
        if error.errno not in _NO_LOCKS:
            raise
        holder = _read(descriptor)
        if exists and not _is_gone(holder):
            raise _refusal(target, holder, f"if that run is over, delete {path}") from None


def _require_own(descriptor: int, target: Path, path: Path) -> None:
    """Raise UsageError for a file of the lock's name that no run made: it would be deleted."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or (status.st_size and not _read(descriptor)):
        remedy = f"if nobody needs it, delete {path}, or name another place"
        raise UsageError(f"output {target}", f"{path} is no lock of a run", remedy)


def _read(descriptor: int) -> dict[str, Any]:
    try:
        content = json.loads(os.pread(descriptor, 1 << 16, 0))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _is_gone(holder: dict[str, Any]) -> bool:
    """Whether a run of this machine has ended; of another machine that cannot be known."""
    if holder.get("host") != socket.gethostname() or not isinstance(holder.get("process"), int):
        return False
    return not Path(f"/proc/{holder['process']}").exists()


def _refusal(target: Path, holder: dict[str, Any], remedy: str) -> UsageError:
    who = "another run, which has just started,"
    if holder:
        who = f"process {holder.get('process')} on {holder.get('host')}"
    since = f" since {holder['since']}" if holder.get("since") else ""
    made_by = f" ({holder['command']})" if holder.get("command") else ""
    return UsageError(
        f"output {target}", f"{who} is making it{since}{made_by}", f"{remedy}, or name another"
    )
