"""Recipe files of ModelOpt: finding one, without torch, and reading its content, with ModelOpt."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from post_training.common import forms
from post_training.common.errors import UsageError, suggest
from post_training.common.quiet import quiet


@dataclass(frozen=True)
class Recipe:
    """A recipe file of ModelOpt. ``kind``: ``ptq`` or ``auto_quantize``."""

    path: Path
    kind: str


class _Metadata(TypedDict):
    recipe_type: str


class _Form(TypedDict):
    metadata: _Metadata


def find(name: str) -> Recipe:
    """The recipe that a path, or the name of a built-in one, means.

    A built-in is named by its path in the package ``modelopt_recipes``, or by its stem if it is
    one of the general ones, such as ``nvfp4_default-kv_fp8``.

    Raises:
        UsageError: if there is none, it is not YAML, or it is not about quantization.
    """
    path = _path(name)
    what = f"--recipe {path}"
    remedy = (
        "start from a recipe of the package modelopt_recipes, such as general/ptq/"
        "fp8_default-kv_fp8.yaml"
    )
    content = forms.read_yaml(path, what, "correct the file")
    kind = forms.parse(content, _Form, what, remedy)["metadata"]["recipe_type"]
    section = {"ptq": "quantize", "auto_quantize": "auto_quantize"}.get(kind)
    if section is None or section not in content:
        raise UsageError(
            what,
            f"its recipe_type is {kind}" + (f" and it has no {section}" if section else ""),
            "give a recipe of type ptq or auto_quantize with its section of the same name",
        )
    return Recipe(path, kind)


def _path(name: str) -> Path:
    found = importlib.util.find_spec("modelopt_recipes")
    if found is None or not found.submodule_search_locations:
        raise UsageError(
            "the package modelopt_recipes",
            "it is not installed; it comes with nvidia-modelopt",
            "python -m post_training.doctor shows what is missing",
        )
    builtin = Path(found.submodule_search_locations[0])
    folders = (Path(), builtin, builtin / "general/ptq", builtin / "general/auto_quantize")
    candidates = [folder / (name + suffix) for suffix in ("", ".yaml") for folder in folders]
    path = next((each for each in candidates if each.is_file()), None)
    if path is None:
        stems = [each.stem for each in sorted(builtin.glob("general/*/*.yaml"))]
        raise UsageError(
            f"--recipe {name}",
            "there is no such file, and no built-in recipe of this name",
            suggest(Path(name).stem, stems) or f"for instance {', '.join(stems[:3])}",
        )
    return path


def load(recipe: Recipe) -> Any:
    """The recipe as ModelOpt reads it, imports resolved.

    Raises:
        UsageError: if ModelOpt refuses it; its own reason is quoted.
    """
    from modelopt.recipe.loader import load_recipe

    try:
        # ModelOpt prints the path.
        with quiet(stdout=True):
            return load_recipe(recipe.path)
    except (ValueError, TypeError, OSError) as error:
        raise UsageError(
            f"--recipe {recipe.path}",
            f"ModelOpt cannot read it: {' '.join(str(error).split())[:400]}",
            "correct the file; the built-in ones under modelopt_recipes are examples",
        ) from error
