"""Command lines and configurations as they are shown and recorded: with secrets hidden."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Sequence
from typing import Any

# Secrets are Hub tokens and the user of a URL, known by their form, the values of these variables
# and what follows a flag whose last word names one. --moe-token-dispatcher-type and
# --max-new-tokens take none.
_TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}")
_USER = re.compile(r"(?<=://)[^/?#\s'\"]+@")
_SECRET_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY")
_SECRET_FLAG = re.compile(
    r"--([\w-]*[-_])?(token|(api|access|secret)[-_]key|secret|password)", re.I
)


def command() -> str:
    """This process's command line, quoted for a shell, with secrets hidden."""
    return quoted(sys.argv)


def quoted(line: Sequence[str]) -> str:
    """The words of a command line, quoted for a shell, with secrets hidden."""
    words: list[str] = []
    hide_next = False
    for word in line:
        flag, equals, _ = word.partition("=")
        is_secret = _SECRET_FLAG.fullmatch(flag) is not None
        if hide_next:
            word = "***"
        elif equals and is_secret:
            word = f"{flag}=***"
        hide_next = is_secret and not equals and not hide_next
        words.append(hide(word))
    return shlex.join(words)


def hide(text: str) -> str:
    """``text`` with Hub tokens, users of URLs and secret variables' values as asterisks."""
    for name in _SECRET_VARIABLES:
        value = os.environ.get(name, "")
        if len(value) >= 8:  # a shorter one is no secret, and may be part of any word
            text = text.replace(value, "***")
    return _USER.sub("***@", _TOKEN.sub("hf_***", text))


def hide_in(value: Any) -> Any:
    """The same for every string in a JSON value."""
    if isinstance(value, str):
        return hide(value)
    if isinstance(value, dict):
        return {name: hide_in(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [hide_in(each) for each in value]
    return value
