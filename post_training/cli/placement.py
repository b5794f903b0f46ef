"""``python -m post_training.placement``: address and port of the first node, for launchers."""

from __future__ import annotations

import argparse

from post_training.common.errors import UsageError, exit_with_usage_error
from post_training.distributed import placement


def main() -> None:
    argparse.ArgumentParser(
        prog="python -m post_training.placement",
        description="Print address and port of the first node.",
    ).parse_args()
    try:
        print(*placement.rendezvous())
    except UsageError as error:
        exit_with_usage_error(error)
