"""What ranks tell each other as Python objects: a failure, a value, what one of them has read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from post_training.common.errors import UsageError


def from_all_ranks[T](value: T) -> list[T]:
    """``value`` of every rank, in order; a collective call."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, value)
    return gathered


def first_failure(failure: str | None) -> str | None:
    """The first rank's reason to fail, on every rank; None if no rank has one. A collective call.

    A rank that raised alone would leave the others waiting in the next collective.
    """
    return next((each for each in from_all_ranks(failure) if each), None)


def on_first_rank[T](load: Callable[[], T]) -> T:
    """Run ``load`` on rank 0 and give its result, or its UsageError, to every rank.

    Without it each of many ranks would ask the hub, and one that failed would leave the others
    waiting in the next collective.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return load()
    result: list[Any] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            result = [load()]
        except UsageError as error:
            result = [error]
    torch.distributed.broadcast_object_list(result, src=0)
    if isinstance(result[0], UsageError):
        raise result[0]
    found: T = result[0]
    return found
