"""Recipe files of ModelOpt: finding one, without torch, and reading its content, with ModelOpt."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from post_training.common.errors import UsageError, suggest
from post_training.common.quiet import quiet


@dataclass(frozen=True)
class Recipe:
    """A recipe file of ModelOpt. ``kind``: ``ptq`` or ``auto_quantize``."""

    path: Path
    kind: str


def find(name: str, option: str = "--recipe") -> Recipe:
    """The recipe that a path, or the name of a built-in one, means.

    A built-in is named by its path in the package ``modelopt_recipes``, or by its stem if it is
    one of the general ones, such as ``nvfp4_default-kv_fp8``.

    Raises:
        UsageError: if there is none, it is not YAML, or it is not about quantization.
    """
    builtin = root()
    candidates = [Path(name), builtin / name]
    candidates += [builtin / "general" / kind / name for kind in ("ptq", "auto_quantize")]
    for candidate in list(candidates):
        candidates.append(candidate.with_name(candidate.name + ".yaml"))
    path = next((each for each in candidates if each.is_file()), None)
    if path is None:
        known = [
            str(each.relative_to(builtin)) for each in sorted(builtin.glob("general/*/*.yaml"))
        ]
        stems = [Path(each).stem for each in known]
        raise UsageError(
            f"{option} {name}",
            "there is no such file, and no built-in recipe of this name",
            suggest(Path(name).stem, stems) or f"for instance {', '.join(stems[:3])}",
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        kind = content["metadata"]["recipe_type"]
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{option} {path}",
            f"it is not YAML: {' '.join(str(error).split())}",
            "correct the file",
        ) from error
    except (TypeError, KeyError) as error:
        raise UsageError(
            f"{option} {path}",
            "it has no metadata.recipe_type",
            "start from a recipe of the package modelopt_recipes, such as general/ptq/"
            "fp8_default-kv_fp8.yaml",
        ) from error
    section = {"ptq": "quantize", "auto_quantize": "auto_quantize"}.get(kind)
    if section is None or section not in content:
        raise UsageError(
            f"{option} {path}",
            f"its recipe_type is {kind}" + (f" and it has no {section}" if section else ""),
            "give a recipe of type ptq or auto_quantize with its section of the same name",
        )
    return Recipe(path, kind)


def root() -> Path:
    """Folder of the recipes that come with ModelOpt."""
    found = importlib.util.find_spec("modelopt_recipes")
    if found is None or not found.submodule_search_locations:
        raise UsageError(
            "the package modelopt_recipes",
            "it is not installed; it comes with nvidia-modelopt",
            "python -m post_training.doctor shows what is missing",
        )
    return Path(next(iter(found.submodule_search_locations)))


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
