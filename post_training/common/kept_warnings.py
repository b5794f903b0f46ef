"""Warnings of this process, kept for the manifest of what it makes. No torch."""

from __future__ import annotations

import logging

from post_training.common import redaction

_MOST = 100  # of a manifest; a warning for each of many files says nothing new
_LONGEST = 2000  # characters


class Keeper(logging.Handler):
    """A handler that keeps each different warning once, in order, with secrets hidden."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = redaction.hide(record.getMessage())
        if len(message) > _LONGEST:
            message = f"{message[:_LONGEST]}..."
        if len(self.messages) < _MOST and message not in self.messages:
            self.messages.append(message)


def messages() -> list[str]:
    """What the stages' logger warned of in this process; a manifest's is its first rank's."""
    handlers = logging.getLogger("post_training").handlers
    kept = [each for each in handlers if isinstance(each, Keeper)]
    return [message for each in kept for message in each.messages]
