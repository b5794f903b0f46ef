"""Text of files in HTML, SVG and Markdown.

Nothing of it is markup there, or changes how the text around it is shown.
"""

from __future__ import annotations

import html
import os
import re
import unicodedata
from pathlib import Path

_LONGEST = 4000  # characters of one text
_MARKDOWN = re.compile(r"([\\`*_\[\]|~$])")
# At the start of a line, where it begins a list, a heading or a rule.
_AT_START = re.compile(r"(?=[-+#=]+\s)|(?<=\d)(?=[.)]\s)")
# They reverse the order in which the text around them is shown.
_DIRECTIONS = {*"\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"}


def printable(text: object) -> str:
    """As text that can be written and shown: without control characters and half characters."""
    whole = os.fspath(text) if isinstance(text, Path) else str(text)
    whole = whole.encode("utf-8", "replace").decode()
    if len(whole) > _LONGEST:
        whole = f"{whole[:_LONGEST]}..."
    return "".join(_shown(character) for character in whole)


def _shown(character: str) -> str:
    if character in "\n\t":
        return character
    hidden = character in _DIRECTIONS or unicodedata.category(character) == "Cc"
    return "\N{REPLACEMENT CHARACTER}" if hidden else character


def escape(text: object) -> str:
    """For the content of an element or a quoted attribute, of HTML and SVG."""
    return html.escape(printable(text), quote=True)


def element(name: str, *content: str, **attributes: object) -> str:
    """An element; ``content`` is markup, the values of attributes are text.

    An underscore of an attribute's name is a hyphen; one at its end is left out (``class_``).
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return f"<{name}{given}>{''.join(content)}</{name}>"


def markdown(text: object) -> str:
    """In one line of Markdown, a cell of a table too."""
    line = " ".join(printable(text).split())
    escaped = _MARKDOWN.sub(r"\\\1", html.escape(line, quote=False))
    first, space, rest = escaped.partition(" ")
    return _AT_START.sub(r"\\", f"{first}{space}", count=1) + rest


def fenced(text: str, language: str = "") -> str:
    """A code block of Markdown, whatever the text holds."""
    shown = printable(text)
    longest = max((len(run) for run in re.findall(r"`+", shown)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{shown}\n{fence}"


def shortened(text: str, most: int) -> str:
    """Of a name that is too long its end, which tells it from others."""
    shown = printable(text)
    return shown if len(shown) <= most else f"…{shown[1 - most :]}"
