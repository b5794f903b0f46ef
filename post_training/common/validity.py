"""Whether an output can stay as it is: what ``python -m post_training.manifest valid`` asks."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from post_training.common import files, manifest, redaction


def is_valid(output: Path, source: str, made_by: Sequence[str] = ()) -> bool:
    """Whether ``output`` can stay as it is.

    Args:
        output: a stage's output folder, or its report.
        source: what it must have been made from, unchanged since: a path, or a hub name.
        made_by: words of the command that must have made it, the stage's program first; by
            default any.
    """
    content = manifest.read(output)
    if content is None or files.changed(output, content.get("outputs", [])):
        return False
    if content.get("versions") != manifest.versions():
        return False
    # A report may say that the model fell short of a limit, a training run that it is unfinished.
    if not (content.get("passed", True) and content.get("complete", True)):
        return False
    if made_by:
        made = shlex.split(content.get("command", ""))
        if _plain(made) != _plain(shlex.split(redaction.quoted(made_by))):
            return False
    made_from = any(_is_input(entry, source) for entry in content.get("inputs", []))
    return made_from and not changed_inputs(content)


def changed_inputs(content: Mapping[str, Any]) -> list[str]:
    """Recorded inputs of a run that are still on this machine, and not what they were then.

    A run that was resumed after a change of its data has both; one of them must be there.
    """
    unchanged: dict[str, bool] = {}
    for entry in _entries({**content, "configuration": None}):
        path = entry["path"]
        if len(entry) > 2 and Path(path).exists():  # more than role and path: it has a hash
            unchanged[path] = unchanged.get(path, False) or entry == manifest.describe_input(
                entry["role"], path
            )
    return [path for path, is_same in unchanged.items() if not is_same]


def gone_inputs(output: Path) -> list[str]:
    """Recorded inputs that cannot be compared any more: they had a hash, and are not there.

    An output stays valid without them: to make it again would fail.
    """
    content = {**(manifest.read(output) or {}), "configuration": None}
    hashed = (entry["path"] for entry in _entries(content) if len(entry) > 2)
    return [path for path in dict.fromkeys(hashed) if not Path(path).exists()]


def _entries(content: Any) -> Iterator[Mapping[str, Any]]:
    """The inputs that are recorded anywhere in ``content``."""
    if isinstance(content, Mapping) and {"role", "path"} <= content.keys():
        yield content
    elif isinstance(content, Mapping | list):
        for each in content.values() if isinstance(content, Mapping) else content:
            yield from _entries(each)


def _plain(words: Sequence[str]) -> list[str]:
    """A command without the parts that do not affect its result: folder, --overwrite."""
    words = [word for word in words if word != "--overwrite"]
    return [Path(words[0]).name, *words[1:]] if words else []


def _is_input(entry: dict[str, Any], source: str) -> bool:
    """Whether a recorded input is ``source``, unchanged."""
    if not Path(source).exists():
        # A hub name: the recorded path is the download's, in huggingface_hub's cache.
        if f"models--{source.replace('/', '--')}" not in Path(entry["path"]).parts:
            return False
        source = entry["path"]
    return {**entry, "role": ""} == {**manifest.describe_input("", source), "role": ""}
