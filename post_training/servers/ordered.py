"""Many requests at once, their answers in order."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from itertools import islice

# Started or done while an earlier one is not: what a slow answer lets the others run ahead.
_AHEAD = 8


async def in_order[A, B](
    items: Iterable[A], work: Callable[[A], Awaitable[B]], most: int
) -> AsyncIterator[B]:
    """What ``work`` makes of each item, in order, with up to ``most`` items at work.

    What fails raises when its turn has come: everything before it has been given then, and nothing
    is left running.
    """
    gate = asyncio.Semaphore(most)

    async def one(item: A) -> B:
        async with gate:
            return await work(item)

    left = iter(items)
    begun = deque(asyncio.ensure_future(one(each)) for each in islice(left, most * _AHEAD))
    try:
        while begun:
            found = await begun[0]
            begun.popleft()
            begun.extend(asyncio.ensure_future(one(each)) for each in islice(left, 1))
            yield found
    finally:
        for task in begun:
            task.cancel()
        await asyncio.gather(*begun, return_exceptions=True)
