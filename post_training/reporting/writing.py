"""A report of folders as files: the page, and the same as text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from post_training.common import files
from post_training.common.errors import UsageError
from post_training.reporting import building, page, text_page


def write(folders: Sequence[Path], target: Path) -> int:
    """Write ``target`` and its text beside it. Returns how many records there are: 0, no files.

    Raises:
        UsageError: if a file cannot be written, or something changed while it was read.
    """
    try:
        document, count = building.build(folders)
    except FileNotFoundError as error:
        cause = "it was replaced while it was read"
        raise UsageError(f"file {error.filename}", cause, "start this again") from error
    if not count:
        return 0
    target.parent.mkdir(parents=True, exist_ok=True)
    texts = {target: page.render(document), text_of(target): text_page.render(document)}
    for path, text in texts.items():
        try:
            files.write_text(path, text)
        except OSError as error:
            cause = error.strerror or "it cannot be written"
            raise UsageError(f"output {path}", cause, "name another file in --output") from error
    return count


def text_of(target: Path) -> Path:
    """Where the report as text lies."""
    return target.with_suffix(".md")
