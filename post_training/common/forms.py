"""The forms of the files that stages read: a value of another type never reaches the code.

A form is a type that pydantic validates strictly: ``list[int]``, a dataclass, or a TypedDict whose
other keys are not looked at. JSON's integers pass for floats; nothing else is converted.
"""

from __future__ import annotations

import dataclasses
import math
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict, get_type_hints

import yaml

from post_training.common import files, json_text, regular
from post_training.common.errors import UsageError

if TYPE_CHECKING:
    from pydantic import TypeAdapter


def parse(content: Any, form: Any, what: str, remedy: str) -> Any:
    """``content`` without the keys that ``form`` does not have; an instance of a dataclass.

    Args:
        content: what was read from the file.
        form: its type.
        what: the content is, in a message.
        remedy: in a message.

    Raises:
        UsageError: unless the content has the form; it names the first place that has not.
    """
    from pydantic import ValidationError

    try:
        found = _adapter(form).validate_python(content, strict=True)
        return form(**found) if isinstance(form, type) and dataclasses.is_dataclass(form) else found
    except (ValidationError, RecursionError) as error:
        cause = "it is nested too deep"
        if isinstance(error, ValidationError):
            first = error.errors(include_url=False)[0]
            place = ".".join(map(str, first["loc"])) or "it"
            is_missing = first["type"] == "missing"
            cause = f"{place} is missing" if is_missing else f"{place} is {first['input']!r:.40}"
            cause += "" if is_missing else f": {first['msg'].replace('Input', 'it', 1)}"
        raise UsageError(what, cause, remedy) from error


@cache
def _adapter(form: Any) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    if not dataclasses.is_dataclass(form):
        return TypeAdapter(form)
    # Strictly, pydantic takes instances of a dataclass only: its fields as the keys of a TypedDict.
    hints: dict[str, Any] = get_type_hints(form)
    for field in dataclasses.fields(form):
        if field.default is not dataclasses.MISSING:
            hints[field.name] = NotRequired[hints[field.name]]
    return TypeAdapter(TypedDict("Fields", hints))  # type: ignore[operator]


def read_json(path: Path, form: Any, what: str, remedy: str) -> Any:
    """Content of a JSON file, which must be there and have the form; UsageError otherwise."""
    return parse(files.read_json_object(path, what, remedy), form, f"{what} {path}", remedy)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which also refuses a name that has two values."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    problem = f"{key.value!r} is there twice"
                    mark = key.start_mark
                    raise yaml.constructor.ConstructorError(problem=problem, problem_mark=mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, what: str, remedy: str) -> Any:
    """Content of a YAML file, as ``yaml.safe_load`` gives it.

    Raises:
        UsageError: if it cannot be read, or is not YAML; with the line where that is known.
    """
    try:
        return parse_yaml(regular.read_text(path), what, remedy)
    except OSError as error:
        raise UsageError(what, f"it cannot be read: {error.strerror}", remedy) from error
    except ValueError as error:  # no text
        raise UsageError(what, f"it is not YAML: {error}", remedy) from error


def is_finite(content: Any) -> bool:
    """Whether no number in what a file holds is NaN or infinite."""
    if isinstance(content, dict):
        content = [*content.keys(), *content.values()]
    if isinstance(content, list):
        return all(map(is_finite, content))
    return not isinstance(content, float) or math.isfinite(content)


def parse_yaml(text: str, what: str, remedy: str) -> Any:
    """What YAML text holds; UsageError as :func:`read_yaml`, or for a number that is not finite."""
    try:
        content = yaml.load(text, _Loader)
        json_text.require_whole_characters(text, content)
        if not is_finite(content):
            raise ValueError("it has a number that is not finite")
        return content
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date such as 2026-13-45
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else f": {error}"
        twice = f": {error.problem}" if isinstance(error, yaml.constructor.ConstructorError) else ""
        raise UsageError(what, f"it is not YAML{line}{twice}", remedy) from error
