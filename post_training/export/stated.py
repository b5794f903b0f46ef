"""What the README.md of a model on the hub states of it in its front matter. No torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from post_training.common import forms, regular
from post_training.common.errors import UsageError

README = "README.md"
_FRONT_MATTER = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*$", re.DOTALL | re.MULTILINE)
_LONGEST = 1 << 16  # characters of a front matter
_NAME = re.compile(r"[\w.+ -]{1,100}")
_LANGUAGE = re.compile(r"[A-Za-z]{2,8}(-[A-Za-z0-9]{1,8})*|multilingual|code")
_LINK = re.compile(r"https?://\S{1,500}|[\w.-]{1,100}")


def license_and_language(folder: Path) -> dict[str, Any]:
    """The entries about license and language, as they are; empty where none is stated.

    They stay true of a model that is made from it. A README.md that says nothing readable about
    them is no reason not to export.
    """
    try:
        text = regular.read_text(folder / README)
        found = _FRONT_MATTER.match(text[:_LONGEST])
        content = forms.parse_yaml(found[1], "front matter", "") if found else None
    except (OSError, ValueError, UsageError):
        return {}
    if not isinstance(content, dict):
        return {}
    stated: dict[str, Any] = {}
    for key, form in (("license", _NAME), ("license_name", _NAME), ("license_link", _LINK)):
        value = content.get(key)
        if isinstance(value, str) and form.fullmatch(value):
            stated[key] = value
    languages = content.get("language")
    listed = [languages] if isinstance(languages, str) else languages
    if isinstance(listed, list) and listed and all(map(_is_language, listed)):
        stated["language"] = listed
    link = stated.get("license_link", "")
    if link and "://" not in link and not (folder / link).is_file():
        del stated["license_link"]  # of a file that does not come along
    return stated


def _is_language(value: object) -> bool:
    # YAML 1.1 reads the code of Norwegian as false.
    return isinstance(value, str) and _LANGUAGE.fullmatch(value) is not None
