"""Command-line flags from dataclass fields: one declaration is name, default, help and check.

    @dataclass(frozen=True, kw_only=True)
    class CalibrationOptions:
        calib_size: int = flag(1024, metavar="N", help="sequences (%(default)s)", check=at_least(1))

adds ``--calib-size`` to a parser (:func:`add`) and reads its value (:func:`read`). The annotation
decides how text is converted: ``bool`` is a switch, ``tuple[str, ...]`` takes several words, ``X |
None`` is an X that may be left out. A field made by :func:`group` holds the options of another such
dataclass, which several stages share. No torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

_FLAG, _GROUP = "flag", "group"


def spelled(name: str) -> str:
    """The flag of a field: ``num_layers`` -> ``--num-layers``."""
    return "--" + name.replace("_", "-")


def flag(
    default: Any = None,
    *,
    help: str,
    check: Callable[[str, Any], None] | None = None,
    names: Sequence[str] = (),
    **argparse_options: Any,
) -> Any:
    """A dataclass field that is a flag.

    Args:
        help: text for ``--help``; ``%(default)s`` stands for the default.
        check: called with the flag and its value, unless that is None; raises UsageError.
        names: further spellings, such as Megatron-LM's.
        argparse_options: ``metavar``, ``choices``, ``nargs``, ``type``, as argparse knows them.
    """
    declared = {"help": help, "names": tuple(names), "check": check, **argparse_options}
    return dataclasses.field(default=default, metadata={_FLAG: declared})


def group(options: type) -> Any:
    """A dataclass field that holds the options of another dataclass."""
    return dataclasses.field(metadata={_GROUP: options})


def shows(show: Callable[[], None]) -> type[argparse.Action]:
    """The ``action`` of a flag that prints something and exits with code 0; ``nargs`` is 0."""

    class Show(argparse.Action):
        def __call__(self, parser: Any, *_: Any) -> None:
            show()
            parser.exit()

    return Show


def add(
    parser: argparse.ArgumentParser,
    options: type,
    title: str = "",
    defaults: Mapping[str, Any] | None = None,
    inherited: Sequence[dataclasses.Field[Any]] = (),
) -> None:
    """Add the flags of a dataclass, and of those that it holds, to ``parser``.

    Args:
        title: heading in the help; by default the class's ``TITLE``.
        defaults: by field name, where they are others than the declared ones or the class's own.
        inherited: fields to leave out.
    """
    defaults = {**getattr(options, "DEFAULTS", {}), **(defaults or {})}
    fields = dataclasses.fields(options)
    own = [each for each in fields if _FLAG in each.metadata and each not in inherited]
    if own:
        group = parser.add_argument_group(title or options.TITLE)  # type: ignore[attr-defined]
        add_fields(group, options, own, defaults)
    for field in fields:
        if _GROUP in field.metadata:
            add(parser, field.metadata[_GROUP], defaults=defaults)


def add_fields(
    group: Any,
    options: type,
    fields: Sequence[dataclasses.Field[Any]],
    defaults: Mapping[str, Any],
) -> None:
    """Add the flags of these fields of a dataclass to a group of arguments."""
    hints = typing.get_type_hints(options)
    for field in fields:
        if _FLAG in field.metadata:
            _add_flag(group, field, hints[field.name], defaults.get(field.name, field.default))


def read(options: type, args: argparse.Namespace) -> dict[str, Any]:
    """The values of a dataclass's flags by field name; UsageError from a field's check."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(options):
        if _GROUP in field.metadata:
            held = field.metadata[_GROUP]
            values[field.name] = held(**read(held, args))
        elif _FLAG in field.metadata:
            value = getattr(args, field.name)
            if isinstance(value, list):
                value = tuple(each for each in value if each is not None)
            check = field.metadata[_FLAG]["check"]
            if check is not None and value is not None:
                check(spelled(field.name), value)
            values[field.name] = value
    return values


def _add_flag(parser: Any, field: dataclasses.Field[Any], hint: Any, default: Any) -> None:
    declared = dict(field.metadata[_FLAG])
    declared.pop("check")
    names = (spelled(field.name), *declared.pop("names"))
    if default is None:
        declared["help"] = declared["help"].replace(" (%(default)s)", "")
    kind = _without_none(hint)
    if kind is bool and "nargs" not in declared:
        parser.add_argument(*names, action="store_true", dest=field.name, **declared)
        return
    if typing.get_origin(kind) is tuple:
        declared.setdefault("nargs", "+")
        kind = typing.get_args(kind)[0]
    if kind is Path:
        kind = _path_or_none
    elif kind is str and kind is not hint:
        kind = _text_or_none
    declared.setdefault("type", kind)
    parser.add_argument(*names, dest=field.name, default=default, **declared)


def _path_or_none(text: str) -> Path | None:
    """Empty text, such as a script's unset variable, is no path; ``Path("")`` would be ``.``."""
    return Path(text) if text else None


def _text_or_none(text: str) -> str | None:
    """Empty text, such as a script's unset variable, is no name."""
    return text or None


def _without_none(hint: Any) -> Any:
    """``X`` of ``X | None``."""
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    return kinds[0] if isinstance(hint, types.UnionType) and len(kinds) == 1 else hint
