"""The rules of the house, read from the source: who may import whom, what loads when, and lengths.

Each rule is a function that lists what breaks it. The rules are tried on toy trees too, which break
them one at a time.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import pytest
from imports import LIBRARY, Import, Tree, When, circles

ROOT = Path(__file__).resolve().parents[2]
# A package may import those before it.
PACKAGES = (
    *("common", "portable", "distributed", "models", "config", "checkpoints", "data", "training"),
    *("inference", "evaluation", "quantization", "distillation", "drafts", "pruning"),
    *("servers", "reporting", "export", "search"),
    "cli",
)
STAGE_LINES, LIBRARY_LINES, MAIN_LINES, THIN_LINES = 200, 300, 10, 8


def package(module: str) -> str | None:
    """The package of a module of the library; None for a stage and for the library's top level."""
    parts = module.split(".")
    return parts[1] if parts[0] == LIBRARY and len(parts) > 1 and parts[1] in PACKAGES else None


def unknown_packages(tree: Tree) -> list[str]:
    folders = {path.parent for path in (tree.root / LIBRARY).glob("*/*.py")}
    return [f"{path.name}: no package of the list" for path in folders if path.name not in PACKAGES]


def upward_imports(tree: Tree) -> list[str]:
    """From a package to one that builds on it; annotations count."""
    found = []
    for each in tree.imports:
        here, there = package(each.module), package(each.target)
        if here and there and PACKAGES.index(there) > PACKAGES.index(here):
            found.append(f"{each}: {here} is below {there}")
    return found


def package_circles(tree: Tree) -> list[str]:
    edges: dict[str, set[str]] = {}
    for each in tree.imports:
        here, there = package(each.module), package(each.target)
        if here and there and here != there:
            edges.setdefault(here, set()).add(there)
    return [" <-> ".join(group) for group in circles(edges)]


def module_circles(tree: Tree) -> list[str]:
    edges: dict[str, set[str]] = {}
    for each in tree.imports:
        if each.target in tree.files and not _is_own_package(each):
            edges.setdefault(each.module, set()).add(each.target)
    return [" <-> ".join(group) for group in circles(edges)]


def _is_own_package(each: Import) -> bool:
    """A package's ``__init__`` gathers its modules, which may read a constant of it."""
    return each.module.startswith(f"{each.target}.") or each.target.startswith(f"{each.module}.")


# Megatron-LM pickles an argparse.Namespace into its checkpoints: a file format, no command line.
PICKLED_NAMESPACE = "post_training.checkpoints.megatron_arguments"


def argparse_elsewhere(tree: Tree) -> list[str]:
    """argparse where no command line is declared."""
    return [
        str(each)
        for each in tree.imports
        if each.root == "argparse"
        and package(each.module) not in ("config", "cli")
        and not each.module.endswith(".options")
        and each.module not in (*tree.stages, PICKLED_NAMESPACE)
    ]


def slow_starts(tree: Tree) -> list[str]:
    """Slow packages that a stage loads before its checks are done."""
    return [" -> ".join(path) for stage in tree.stages for path in tree.reached(stage).values()]


def needless_delays(tree: Tree) -> list[str]:
    """Imports within functions although nothing slow is behind them."""
    return [
        f"{each}, which is quick to load"
        for each in tree.imports
        if each.when is When.CALLED
        and not each.heavy
        and not (each.target in tree.files and tree.reached(each.target))
    ]


def long_files(tree: Tree) -> list[str]:
    found = []
    for name, path in tree.files.items():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        limit = STAGE_LINES if name in tree.stages else LIBRARY_LINES
        if lines > limit:
            found.append(f"{path.relative_to(tree.root)}: {lines} lines, at most {limit}")
    return found


def long_mains(tree: Tree) -> list[str]:
    found = []
    for path in tree.files.values():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name == "main" and node.end_lineno:
                lines = node.end_lineno - node.lineno + 1
                if lines > MAIN_LINES:
                    found.append(f"{path.relative_to(tree.root)}: main has {lines} lines")
    return found


def crowded_top_level(tree: Tree) -> list[str]:
    """Anything but ``__init__.py`` and modules that only call a ``main`` for ``python -m``."""
    found = []
    for path in (tree.root / LIBRARY).iterdir():
        if path.is_dir() or path.name in ("__init__.py", "py.typed"):
            continue
        text = path.read_text(encoding="utf-8")
        if 'if __name__ == "__main__"' not in text or len(text.splitlines()) > THIN_LINES:
            found.append(f"{path.relative_to(tree.root)}: no thin module for python -m")
    return found


def imported_stages(tree: Tree) -> list[str]:
    return [
        str(each)
        for each in tree.imports
        if each.root in tree.stages and each.module in tree.library
    ]


RULES: tuple[Callable[[Tree], list[str]], ...] = (
    unknown_packages,
    upward_imports,
    package_circles,
    module_circles,
    argparse_elsewhere,
    slow_starts,
    needless_delays,
    long_files,
    long_mains,
    crowded_top_level,
    imported_stages,
)


@pytest.fixture(scope="module")
def house() -> Tree:
    return Tree(ROOT)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps_its_rules(house, rule):
    assert rule(house) == []


def test_all_stages_are_read(house):
    assert {"convert", "eagle3", "export", "quantize", "validate"} <= house.stages.keys()
    assert len(house.library) > 100


# For each rule a file that breaks it, beside a sound tree.
SOUND = {
    "convert.py": "from post_training.common import files\n\ndef main() -> None:\n    pass\n",
    f"{LIBRARY}/__init__.py": "",
    f"{LIBRARY}/doctor.py": "from post_training.cli.doctor import main\n\n"
    'if __name__ == "__main__":\n    main()\n',
    f"{LIBRARY}/common/__init__.py": "",
    f"{LIBRARY}/common/files.py": "import json\n",
    f"{LIBRARY}/models/__init__.py": "",
    f"{LIBRARY}/models/builder.py": "import torch\nfrom post_training.common import files\n",
    f"{LIBRARY}/cli/__init__.py": "",
    f"{LIBRARY}/cli/doctor.py": "import argparse\n\ndef main() -> None:\n    import torch\n",
}
BROKEN = {
    unknown_packages: (f"{LIBRARY}/utils/things.py", ""),
    upward_imports: (
        f"{LIBRARY}/common/report.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n"
        "    from post_training.models.builder import Model\n",
    ),
    package_circles: (
        f"{LIBRARY}/common/report.py",
        "def show():\n    from post_training.models import builder\n",
    ),
    module_circles: (
        f"{LIBRARY}/common/files.py",
        "import typing\nif typing.TYPE_CHECKING:\n    from .outputs import check\n",
    ),
    argparse_elsewhere: (f"{LIBRARY}/models/table.py", "import argparse\n"),
    slow_starts: ("quantize.py", "from post_training.models.builder import build\n"),
    needless_delays: (
        f"{LIBRARY}/models/table.py",
        "def table():\n    from post_training.common import files\n",
    ),
    long_files: ("quantize.py", "pass\n" * (STAGE_LINES + 1)),
    long_mains: ("quantize.py", "def main() -> None:\n" + "    pass\n" * MAIN_LINES),
    crowded_top_level: (f"{LIBRARY}/helpers.py", "def helper(): ...\n"),
    imported_stages: (f"{LIBRARY}/cli/doctor.py", "import convert\n"),
}


def write(root: Path, files: dict[str, str]) -> Tree:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Tree(root)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_each_rule_finds_what_breaks_it(tmp_path, rule):
    outputs = f"{LIBRARY}/common/outputs.py"
    sound = {**SOUND, outputs: "from post_training.common import files\n"}
    assert rule(write(tmp_path / "sound", sound)) == []
    name, text = BROKEN[rule]
    assert len(rule(write(tmp_path / "broken", {**sound, name: text}))) == 1


def test_a_slow_package_is_named_with_the_imports_that_lead_to_it(tmp_path):
    broken = {**SOUND, "quantize.py": BROKEN[slow_starts][1]}
    assert slow_starts(write(tmp_path, broken)) == [
        "quantize -> post_training.models.builder -> torch"
    ]
