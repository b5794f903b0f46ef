"""``python -m post_training.manifest``: may an output be kept? How is a command shown? No torch."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from post_training.common import redaction, validity
from post_training.common.errors import UsageError


def main() -> None:
    args = _arguments()
    if args.command == "quote":
        print(redaction.quoted(args.words))
        return
    sys.exit(0 if _is_valid(args) else 1)


def _is_valid(args: argparse.Namespace) -> bool:
    try:
        found = validity.is_valid(args.output, args.source, args.made_by)
        gone = validity.gone_inputs(args.output) if found else []
    except UsageError:
        return False
    for path in gone:
        print(f"{args.output}: not compared, since it is gone: {path}", file=sys.stderr)
    return found


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m post_training.manifest", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    valid = commands.add_parser("valid", help="exit code 0 if OUTPUT can stay as it is, else 1")
    valid.add_argument("output", type=Path, metavar="OUTPUT")
    valid.add_argument("source", metavar="INPUT")
    valid.add_argument("made_by", nargs=argparse.REMAINDER, metavar="COMMAND")
    quote = commands.add_parser("quote", help="print WORDS quoted for a shell, without secrets")
    quote.add_argument("words", nargs=argparse.REMAINDER, metavar="WORDS")
    return parser.parse_args()
