"""Third parties' prints, warnings and log messages that say nothing a user can act on. No torch."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

logger = logging.getLogger("post_training")


@contextlib.contextmanager
def quiet(
    *loggers: str, stdout: bool = False, stderr: bool = False, warning: str | None = None
) -> Iterator[None]:
    """Silence what is named, and nothing else, until the block ends.

    The stages' own log keeps the stderr that it was set up with, so it is heard all the same.

    Args:
        loggers: names of loggers of which only errors come through.
        stdout: log what is printed at level debug instead.
        stderr: drop what is written there, such as progress bars that nobody watches.
        warning: regular expression for the beginning of warnings to ignore; ``""`` for all.
    """
    levels = {name: logging.getLogger(name).level for name in loggers}
    printed = io.StringIO()
    try:
        with contextlib.ExitStack() as stack:
            if warning is not None:
                stack.enter_context(warnings.catch_warnings())
                warnings.filterwarnings("ignore", warning)
            if stdout:
                stack.enter_context(contextlib.redirect_stdout(printed))
            if stderr:
                stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            for name in loggers:
                logging.getLogger(name).setLevel(logging.ERROR)
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        for line in printed.getvalue().splitlines():
            if line.strip():
                logger.debug("printed: %s", line.rstrip())
