"""Flags that say which prompts a model answers, shared by the stages that decode. No torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, ClassVar

from post_training.common.errors import UsageError
from post_training.config.checks import at_least
from post_training.config.flags import flag
from post_training.data import prompts, records

OPTION = "--prompts-path"
_ROWS_CHECKED = 10_000  # of local prompts, before anything is loaded


def _json_object(option: str, text: str) -> None:
    """Raise UsageError unless the text is a JSON object."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UsageError(
            f"{option} {text}",
            "it is no JSON object",
            """quote it for the shell: '{"enable_thinking": false}'""",
        )


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    TITLE: ClassVar[str] = "prompts"

    prompts_path: str | None = flag(
        metavar="PATH_OR_NAME",
        help="JSONL, parquet, CSV or text (a prompt a line), a folder of such, or a hub name "
        "(%(default)s)",
    )
    prompts_split: str | None = flag(
        metavar="NAME", help="of a data set on the hub (train, else its first)"
    )
    prompts_limit: int | None = flag(metavar="N", check=at_least(1), help="the first rows only")
    chat_template_options: str = flag(
        "{}",
        metavar="JSON",
        check=_json_object,
        help="""variables of the chat template, such as '{"enable_thinking": false}'""",
    )

    @property
    def template_options(self) -> dict[str, Any]:
        """``--chat-template-options`` as a dictionary."""
        return dict(json.loads(self.chat_template_options))


def check(options: PromptOptions) -> None:
    """Read the first rows of local prompts. Raises UsageError as :func:`load`."""
    if options.prompts_path and records.is_local(options.prompts_path):
        limit = min(options.prompts_limit or _ROWS_CHECKED, _ROWS_CHECKED)
        prompts.load(options.prompts_path, OPTION, limit=limit)


def load(options: PromptOptions) -> prompts.Prompts:
    """All prompts that the options name; UsageError as :func:`post_training.data.prompts.load`."""
    path, limit, split = options.prompts_path, options.prompts_limit, options.prompts_split
    return prompts.load(str(path), OPTION, limit=limit, split=split)
