"""The table of flags in ``transformer_fields.json``, generated from megatron-core's classes.

Every field of ``TransformerConfig`` and ``MLATransformerConfig`` that a command line can express
becomes an entry: name, type, default, choices, and the field's own documentation as help. Reading
the table takes milliseconds, importing megatron-core takes seconds: ``--help`` and usage errors are
immediate.

    python -m post_training.flags_table    # rewrite transformer_fields.json (imports megatron-core)

Types: ``int float str bool choice dtype``; ``numbers`` (a number, or a list such as ``127,0``,
``[0,1]`` or ``[0]*3+[1]*58``); ``words`` and ``floats`` (one or more values after the flag).
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import functools
import inspect
import json
import types
import typing
from pathlib import Path
from typing import Any

from post_training.common import files

FILE = Path(__file__).with_name("transformer_fields.json")
ACTIVATIONS = ("gelu", "silu", "relu", "squared_relu", "quick_gelu")
DTYPES = ("fp32", "bf16", "fp16")


@functools.cache
def load() -> dict[str, dict[str, Any]]:
    """The table: field name -> entry with ``type``, ``default``, ``help`` and perhaps more.

    Optional keys: ``choices``; ``spellings``, Megatron-LM's other names for the flag;
    ``mla_default``, the default with multi-latent attention if it differs.
    """
    return files.read_json_object(FILE, "file of this package", "install it again")


def generate() -> str:
    """The content of ``transformer_fields.json`` for the installed megatron-core."""
    from megatron.core.transformer.transformer_config import (
        MLATransformerConfig,
        TransformerConfig,
    )

    documentation = _documentation(MLATransformerConfig)
    plain = {field.name: field for field in dataclasses.fields(TransformerConfig)}
    table = {}
    for field in dataclasses.fields(MLATransformerConfig):
        base = plain.get(field.name, field)
        entry = _entry(base, documentation.get(field.name, ""))
        if entry is None:
            continue
        if _default(field) != entry["default"]:
            entry["mla_default"] = _default(field)
        table[field.name] = entry
    return json.dumps(table, indent=1, ensure_ascii=False) + "\n"


def _entry(field: dataclasses.Field[Any], documentation: str) -> dict[str, Any] | None:
    """The entry of one field, or None for a field that no command line can express."""
    if field.name == "activation_func":
        kind: dict[str, Any] = {"type": "choice", "choices": list(ACTIVATIONS)}
    else:
        found = _kind(field.type)
        if found is None or field.name.startswith("_"):
            return None
        kind = found
    meta = field.metadata.get("argparse_meta", {})
    entry = {**kind, "default": _default(field), "help": documentation}
    if "choices" in meta:
        entry |= {"type": "choice", "choices": list(meta["choices"])}
    if "arg_names" in meta:
        entry["spellings"] = list(meta["arg_names"])
    return entry


def _kind(annotation: Any) -> dict[str, Any] | None:
    """``{"type": ..., "choices": ...}`` for an annotation; None if no text can express it."""
    import torch

    members = [m for m in _members(annotation) if m is not types.NoneType]
    literals = [m for m in members if typing.get_origin(m) is typing.Literal]
    if literals:
        return {"type": "choice", "choices": list(typing.get_args(literals[0]))}
    enums = [m for m in members if isinstance(m, type) and issubclass(m, enum.Enum)]
    if enums and str not in members:
        return {"type": "choice", "choices": [item.name for item in enums[0]]}
    if members == [torch.dtype]:
        return {"type": "dtype", "choices": list(DTYPES)}
    lists = [typing.get_args(m)[0] for m in members if typing.get_origin(m) in (list, tuple)]
    if lists and lists[0] is int:
        return {"type": "numbers"}
    if lists and lists[0] is float:
        return {"type": "floats"}
    if lists and lists[0] is str:
        return {"type": "words"}
    for plain in (bool, int, float, str):
        if plain in members:
            return {"type": plain.__name__}
    return None


def _members(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def _default(field: dataclasses.Field[Any]) -> Any:
    """The field's default as a JSON value."""
    import torch

    value = field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, torch.dtype):
        return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[value]
    if callable(value):
        return getattr(value, "__name__", str(value))
    return value


def _documentation(configuration: type) -> dict[str, str]:
    """The text below each field in the source of ``configuration`` and its bases."""
    found: dict[str, str] = {}
    for cls in reversed(configuration.__mro__[:-1]):
        body = ast.parse(inspect.getsource(cls)).body[0]
        if not isinstance(body, ast.ClassDef):
            continue
        for statement, following in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(following, ast.Expr)
                and isinstance(following.value, ast.Constant)
                and isinstance(following.value.value, str)
            ):
                found[statement.target.id] = " ".join(following.value.value.split())
    return found


def main() -> None:
    FILE.write_text(generate(), encoding="utf-8")
