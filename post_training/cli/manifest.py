"""``python -m post_training.manifest``: may an output stay as it is? No torch."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from post_training.common import manifest
from post_training.common.errors import UsageError


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m post_training.manifest", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    valid = commands.add_parser("valid", help="exit code 0 if OUTPUT can stay as it is, else 1")
    valid.add_argument("output", type=Path, metavar="OUTPUT")
    valid.add_argument("source", metavar="INPUT")
    valid.add_argument("made_by", nargs=argparse.REMAINDER, metavar="COMMAND")
    args = parser.parse_args()
    try:
        sys.exit(0 if manifest.is_valid(args.output, args.source, args.made_by) else 1)
    except UsageError:
        sys.exit(1)
