"""A limit of memory for code that comes with a model."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def limited(more: int) -> Iterator[None]:
    """Within this context this process may map at most ``more`` bytes than it does now.

    What needs more gets a MemoryError that says so. Other threads are under the same limit: leave
    them room.
    """
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + more
    if before[0] != resource.RLIM_INFINITY:
        limit = min(limit, before[0])
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    except MemoryError:
        raise MemoryError(f"it takes more than {more >> 30} GiB of memory") from None
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
