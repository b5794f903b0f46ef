"""An exported folder while it is written: begun by rank 0, verified by every rank. Collective."""

from __future__ import annotations

from pathlib import Path

from post_training.common import files
from post_training.common.errors import UsageError
from post_training.distributed.collectives import from_all_ranks, on_first_rank


def begin(target: Path) -> Path:
    """The empty folder that is written into, until ``files.publish`` gives it its name."""
    return on_first_rank(lambda: files.begin(target))


def require_equal(problems: list[str], folder: Path) -> None:
    """Fail on every rank if one of them found a problem.

    Raises:
        UsageError: naming the first problems.
    """
    found = [problem for each in from_all_ranks(problems) for problem in each]
    if found:
        raise UsageError(
            f"export {folder}",
            f"{len(found)} differences from the model: " + "; ".join(found[:5]),
            "this is a fault of the exporter, and the folder was not given its final name: report "
            "it with the command and run.json of the checkpoint",
        )
