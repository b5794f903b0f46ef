"""What an engine counts of its draft: verifications, and how many draft tokens each accepted.

vLLM's ``/metrics`` has counters since its start (``vllm:spec_decode_*``); what a request adds to
them is known where no other is under way. SGLang tells it with each answer
(``return_spec_tokens_details``). Neither counts the pass over the prompt.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from post_training.common.errors import UsageError
from post_training.servers import identity
from post_training.servers.identity import Server

_LINE = re.compile(r"^(?P<name>[\w:]+)(?:\{(?P<labels>.*)\})?\s+(?P<value>\S+)", re.MULTILINE)
_POSITION = re.compile(r'position="(\d+)"')
_DRAFTS = "vllm:spec_decode_num_drafts_total"
_ACCEPTED = "vllm:spec_decode_num_accepted_tokens_total"
_BY_POSITION = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
_GENERATED = "vllm:generation_tokens_total"
_SETTLED, _MOST_READS = 0.05, 100  # seconds between two readings that must agree, and how many
DETAILS = "return_spec_tokens_details"  # SGLang's field of a request


@dataclass(frozen=True)
class Counters:
    """vLLM's, since its start or between two readings.

    Attributes:
        drafts: verifications.
        by_position: of them, those that accepted the draft token at each position, and so all
            before it.
        generated: tokens of all answers.
    """

    drafts: int
    by_position: tuple[int, ...]
    generated: int

    def since(self, before: Counters) -> Counters:
        pairs = zip(self.by_position, before.by_position, strict=True)
        return Counters(
            self.drafts - before.drafts,
            tuple(now - then for now, then in pairs),
            self.generated - before.generated,
        )

    def accepted(self) -> list[int]:
        """Draft tokens that each verification accepted, in no order."""
        at_least = (self.drafts, *self.by_position, 0)
        return [
            count
            for count in range(len(self.by_position) + 1)
            for _ in range(at_least[count] - at_least[count + 1])
        ]


def read(server: Server) -> Counters:
    """vLLM's counters now.

    Raises:
        UsageError: if there are none: it is another engine, or has no draft.
    """
    response = identity.get(server.address, f"{server.address.root}/metrics")
    found: dict[str, float] = {}
    positions: dict[int, float] = {}
    for line in _LINE.finditer(response.text if response.status_code == 200 else ""):
        name, labels = line["name"], line["labels"] or ""
        try:
            value = float(line["value"])
        except ValueError:
            continue
        if name == _BY_POSITION and (place := _POSITION.search(labels)):
            number = int(place[1])
            positions[number] = positions.get(number, 0.0) + value
        elif name in (_DRAFTS, _ACCEPTED, _GENERATED):
            found[name] = found.get(name, 0.0) + value  # of all engines behind the server
    if _DRAFTS not in found or not positions:
        raise _none(server, bool(found))
    return Counters(
        int(found[_DRAFTS]),
        tuple(int(positions[each]) for each in sorted(positions)),
        int(found.get(_GENERATED, 0)),
    )


def _none(server: Server, is_vllm: bool) -> UsageError:
    what = f"server {server.address.shown}"
    if is_vllm or server.engine == identity.VLLM:
        return UsageError(
            what,
            "its /metrics has no vllm:spec_decode_num_drafts_total: it decodes without a draft, or "
            "with --disable-log-stats",
            "start it with --speculative-config, and without --disable-log-stats",
        )
    return UsageError(
        what,
        "it counts no accepted draft tokens: vLLM does at /metrics, SGLang with each answer",
        "serve the draft with one of these, or measure it here: validate.sh without --server",
    )


async def settled(server: Server) -> Counters:
    """The counters when what was answered is counted: two readings agree."""
    before = await asyncio.to_thread(read, server)
    for _ in range(_MOST_READS):
        await asyncio.sleep(_SETTLED)
        now = await asyncio.to_thread(read, server)
        if now == before:
            return now
        before = now
    raise UsageError(
        f"server {server.address.shown}",
        "its counters go on changing after its answers: it serves others too",
        "measure on a server that nobody else uses",
    )


def steps_of(server: Server, accepted: Sequence[Sequence[int]]) -> int:
    """Draft tokens at a time of SGLang; at least what was accepted."""
    told = server.described.get("speculative_num_steps")
    most = max((count for answer in accepted for count in answer), default=1)
    return max(1, most, told if isinstance(told, int) else 0)


def told_accepted(server: Server, parts: Sequence[Mapping[str, Any]]) -> list[int]:
    """Draft tokens that each verification accepted, as SGLang tells at the end of an answer.

    Raises:
        UsageError: if it does not.
    """
    for part in reversed(parts):
        details = (part.get("sglext") or {}).get("spec_tokens_details")
        if isinstance(details, Mapping):
            histogram = details.get("spec_correct_drafts_histogram") or []
            return [count for count, times in enumerate(histogram) for _ in range(int(times))]
    raise UsageError(
        f"server {server.address.shown}",
        "its answers say nothing of a draft (sglext.spec_tokens_details): it decodes without one",
        "start it with --speculative-algorithm EAGLE3; SGLang 0.5.23 tells",
    )
