"""Flags that say which prompts a model answers, shared by the stages that decode. No torch."""

from __future__ import annotations

import argparse
import json
from typing import Any

from post_training.common.errors import UsageError
from post_training.data import prompts, records

OPTION = "--prompts-path"
_ROWS_CHECKED = 10_000  # of local prompts, before anything is loaded


def add(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Add the flags; ``default`` is the source if none is named."""
    group = parser.add_argument_group("prompts")
    group.add_argument(
        OPTION,
        default=default,
        metavar="PATH_OR_NAME",
        help="JSONL, parquet, CSV or text (a prompt a line), a folder of such, or a hub name"
        + (f" ({default})" if default else ""),
    )
    group.add_argument(
        "--prompts-split", metavar="NAME", help="of a data set on the hub (train, else its first)"
    )
    group.add_argument("--prompts-limit", type=int, metavar="N", help="the first rows only")
    group.add_argument(
        "--chat-template-options",
        default="{}",
        metavar="JSON",
        help="""variables of the chat template, such as '{"enable_thinking": false}'""",
    )


def check(args: argparse.Namespace) -> None:
    """Check the values, and local prompts' first rows.

    Raises:
        UsageError: for what cannot work.
    """
    positive(args, "prompts_limit")
    template_options(args)
    if records.is_local(args.prompts_path):
        limit = min(args.prompts_limit or _ROWS_CHECKED, _ROWS_CHECKED)
        prompts.load(args.prompts_path, OPTION, limit=limit)


def load(args: argparse.Namespace) -> prompts.Prompts:
    """All prompts that the arguments name. Raises UsageError as :func:`prompts.load`."""
    return prompts.load(
        args.prompts_path, OPTION, limit=args.prompts_limit, split=args.prompts_split
    )


def template_options(args: argparse.Namespace) -> dict[str, Any]:
    """``--chat-template-options`` as a dictionary.

    Raises:
        UsageError: if it is no JSON object.
    """
    try:
        found = json.loads(args.chat_template_options)
    except ValueError as error:
        found = error
    if not isinstance(found, dict):
        raise UsageError(
            f"--chat-template-options {args.chat_template_options}",
            "it is no JSON object",
            """quote it for the shell: '{"enable_thinking": false}'""",
        )
    return found


def positive(args: argparse.Namespace, *names: str) -> None:
    """Raise UsageError for a number below 1 among these arguments; None passes."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"{flag} {value}", "it is not positive", "give 1 or more")
