"""``transformer_fields.json`` from megatron-core's classes. As a program it rewrites the file.

PYTHONPATH=. python tests/helpers/flags_table.py
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import inspect
import itertools
import json
import types
import typing
from typing import Any

from post_training.models.transformer_fields import DTYPES, FILE

ACTIVATIONS = ("gelu", "silu", "relu", "squared_relu", "quick_gelu")


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
        kind = _kind(base)
        if kind is None or field.name.startswith("_"):
            continue
        entry = {**kind, "default": _default(base), "help": documentation.get(field.name, "")}
        if "arg_names" in base.metadata.get("argparse_meta", {}):
            entry["spellings"] = list(base.metadata["argparse_meta"]["arg_names"])
        if _default(field) != entry["default"]:
            entry["mla_default"] = _default(field)
        table[field.name] = entry
    return json.dumps(table, indent=1, ensure_ascii=False) + "\n"


def _kind(field: dataclasses.Field[Any]) -> dict[str, Any] | None:
    """``{"type": ..., "choices": ...}`` for a field; None if no text can express its value."""
    import torch

    choices = field.metadata.get("argparse_meta", {}).get("choices")
    if field.name == "activation_func":
        choices = ACTIVATIONS
    members = [field.type]
    if typing.get_origin(field.type) in (typing.Union, types.UnionType):
        members = [m for m in typing.get_args(field.type) if m is not types.NoneType]
    for member in members:
        origin, arguments = typing.get_origin(member), typing.get_args(member)
        if origin is typing.Literal:
            choices = choices or arguments
        elif isinstance(member, enum.EnumType) and str not in members:
            choices = choices or [item.name for item in member]
    if choices:
        return {"type": "choice", "choices": list(choices)}
    if members == [torch.dtype]:
        return {"type": "dtype", "choices": list(DTYPES)}
    for member in members:
        if typing.get_origin(member) in (list, tuple):
            kinds = {int: "numbers", float: "floats", str: "words"}
            if typing.get_args(member)[0] in kinds:
                return {"type": kinds[typing.get_args(member)[0]]}
    plain = (kind.__name__ for kind in (bool, int, float, str) if kind in members)
    found = next(plain, None)
    return {"type": found} if found else None


def _default(field: dataclasses.Field[Any]) -> Any:
    """The field's default as a JSON value."""
    import torch

    if field.name == "q_lora_rank":
        return None  # no latent of the queries, as Megatron-LM's command line has it
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
        (body,) = ast.parse(inspect.getsource(cls)).body
        for statement, following in itertools.pairwise(ast.iter_child_nodes(body)):
            if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
                text = ast.literal_eval(following.value)
                found[ast.unparse(statement.target)] = " ".join(text.split())
    return found


if __name__ == "__main__":
    FILE.write_text(generate(), encoding="utf-8")
