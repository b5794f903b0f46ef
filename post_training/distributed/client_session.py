"""The process of a stage that asks a server: one, without torch, devices and process groups."""

from __future__ import annotations

import contextlib
import functools
import logging
import resource
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from post_training.common.errors import UsageError, exit_with_usage_error
from post_training.distributed import logs, signals
from post_training.distributed.parallel import Parallel
from post_training.distributed.session import Session, end

logger = logging.getLogger("post_training")


@dataclass
class ClientSession(Session):
    """A session that has no device."""

    device: Any = field(default=None)
    rank: int = 0
    world: int = 1

    def peak_memory(self) -> dict[str, int]:
        """The peak of this process, in bytes."""
        return {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


@contextlib.contextmanager
def open_session(
    stage: str,
    parallel: Parallel,
    *,
    log_level: str = "info",
    ignored_flags: Sequence[str] = (),
    notices: Sequence[str] = (),
    progress_bars: bool = True,
) -> Iterator[Session]:
    """As :func:`post_training.distributed.session.open_session`, for a stage that asks a server."""
    logs.configure(stage, log_level)
    if ignored_flags:
        logger.debug("flags without meaning here: %s", " ".join(ignored_flags))
    for notice in notices:
        logger.info("%s", notice)
    try:
        with signals.prompt_exit(functools.partial(end, stage)) as imported:
            imported()
            yield ClientSession(stage, parallel, progress_bars=progress_bars)
    except UsageError as error:
        exit_with_usage_error(error)
