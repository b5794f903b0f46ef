"""What ranks tell each other as Python objects: a failure, a value, what one of them has done."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch

from post_training.common.errors import UsageError, first_line

logger = logging.getLogger("post_training")


def from_all_ranks[T](value: T, group: torch.distributed.ProcessGroup | None = None) -> list[T]:
    """``value`` of every rank, in order; a collective call.

    Args:
        group: of the ranks that take part; None: all.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size(group) == 1:
        return [value]
    gathered: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(gathered, value, group=group)
    return gathered


def first_failure(failure: str | None) -> str | None:
    """The first rank's reason to fail, on every rank; None if no rank has one. A collective call.

    A rank that raised alone would leave the others waiting in the next collective.
    """
    return next((each for each in from_all_ranks(failure) if each), None)


@contextlib.contextmanager
def fail_together(
    expected: tuple[type[Exception], ...], refusal: Callable[[str], UsageError]
) -> Iterator[None]:
    """If a rank's block fails, fail on every rank; the end of the block is a collective call.

    Args:
        expected: exceptions that are a failure; others pass.
        refusal: gives the error to raise, from the first failing rank's reason.
    """
    failure = None
    try:
        yield
    except expected as error:
        failure = first_line(error)
        logger.debug("failed on this rank", exc_info=True)
    reason = first_failure(failure)
    if reason:
        raise refusal(reason)


def on_first_rank[T](work: Callable[[], T]) -> T:
    """Run ``work`` on rank 0 while the others wait; its result, or its UsageError, on every rank.

    For what is read, downloaded or written once: a rank 0 that failed alone would leave the others
    waiting in the next collective.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return work()
    result: list[Any] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            result = [work()]
        except UsageError as error:
            result = [error]
    torch.distributed.broadcast_object_list(result, src=0)
    if isinstance(result[0], UsageError):
        raise result[0]
    found: T = result[0]
    return found
