"""Every import of the library and the stages, read from the source: nothing is imported for it.

A module is named as Python names it, such as ``post_training.common.files``; a stage is a file
beside the library, such as ``convert``. An import within ``if TYPE_CHECKING`` creates a dependency
between packages but loads nothing; one within a function loads when the function is called.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto
from functools import cached_property
from pathlib import Path

LIBRARY = "post_training"
# What takes long to import, or may be missing where checks still have to work.
HEAVY = frozenset(
    """
    accelerate datasets huggingface_hub lm_eval matplotlib megatron modelopt numpy pandas peft
    openai psutil pyarrow pydantic requests rich safetensors.torch scipy sklearn tensorboard torch
    transformer_engine transformers triton
    """.split()
)


class When(Enum):
    LOADING = auto()
    CALLED = auto()
    TYPES = auto()


@dataclass(frozen=True)
class Import:
    """One imported name; ``target`` is a module of the tree where the name leads to one."""

    module: str
    target: str
    line: int
    when: When

    def __str__(self) -> str:
        return f"{self.module}:{self.line} imports {self.target}"

    @property
    def heavy(self) -> str | None:
        """The slow package that is imported itself."""
        parts = self.target.split(".")
        prefixes = (".".join(parts[: count + 1]) for count in range(len(parts)))
        return next((prefix for prefix in prefixes if prefix in HEAVY), None)

    @property
    def root(self) -> str:
        return self.target.split(".")[0]


class Tree:
    """The library and the stages below ``root``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.stages = {path.stem: path for path in sorted(root.glob("*.py"))}
        self.library = {
            _module_name(path.relative_to(root)): path
            for path in sorted((root / LIBRARY).rglob("*.py"))
        }
        self.files = {**self.library, **self.stages}

    @cached_property
    def imports(self) -> list[Import]:
        return [each for name, path in self.files.items() for each in self._of(name, path)]

    @cached_property
    def loaded(self) -> dict[str, set[str]]:
        """What each module loads while it is imported itself: modules of the tree."""
        found: dict[str, set[str]] = {name: set() for name in self.files}
        for each in self.imports:
            if each.when is When.LOADING:
                # A package's __init__ is loaded before its modules.
                parts = each.target.split(".")
                names = {".".join(parts[: count + 1]) for count in range(len(parts))}
                found[each.module] |= names & self.files.keys()
        return found

    @cached_property
    def slow(self) -> dict[str, set[str]]:
        """The slow packages that each module imports at its own top level."""
        found: dict[str, set[str]] = {name: set() for name in self.files}
        for each in self.imports:
            if each.when is When.LOADING and each.heavy:
                found[each.module].add(each.heavy)
        return found

    def reached(self, module: str) -> dict[str, list[str]]:
        """Each slow package that importing ``module`` loads, with the path of imports to it."""
        paths = {module: [module]}
        waiting = [module]
        found: dict[str, list[str]] = {}
        while waiting:
            current = waiting.pop(0)
            for package in sorted(self.slow[current]):
                found.setdefault(package, [*paths[current], package])
            for target in sorted(self.loaded[current] - paths.keys()):
                paths[target] = [*paths[current], target]
                waiting.append(target)
        return found

    def _of(self, name: str, path: Path) -> Iterator[Import]:
        is_package = path.name == "__init__.py"
        for node, when in _statements(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            else:
                targets = self._from(name, is_package, node)
            for target in targets:
                yield Import(name, target, node.lineno, when)

    def _from(self, name: str, is_package: bool, node: ast.ImportFrom) -> list[str]:
        base = node.module or ""
        if node.level:
            parts = name.split(".")
            above = parts[: len(parts) - node.level + is_package]
            base = ".".join([*above, *([node.module] if node.module else [])])
        whole = [f"{base}.{alias.name}" for alias in node.names]
        if base.split(".")[0] == LIBRARY or base in self.stages:
            return sorted({each if each in self.files else base for each in whole})
        return whole if any(each in HEAVY for each in whole) else [base]


def _module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _statements(
    node: ast.AST, when: When = When.LOADING
) -> Iterator[tuple[ast.Import | ast.ImportFrom, When]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, when
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from _statements(child, When.CALLED)
        elif isinstance(child, ast.If) and _is_type_checking(child.test):
            yield from _statements(ast.Module(child.body, []), When.TYPES)
            yield from _statements(ast.Module(child.orelse, []), when)
        else:
            yield from _statements(child, when)


def _is_type_checking(test: ast.expr) -> bool:
    name = test.attr if isinstance(test, ast.Attribute) else getattr(test, "id", "")
    return name == "TYPE_CHECKING"


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that reach each other (Tarjan, 1972)."""
    index: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = lowest[node] = len(index)
        stack.append(node)
        for following in sorted(edges.get(node, ())):
            if following not in index:
                visit(following)
                lowest[node] = min(lowest[node], lowest[following])
            elif following in stack:
                lowest[node] = min(lowest[node], index[following])
        if lowest[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1 or node in edges.get(node, ()):
                found.append(sorted(group))

    for node in sorted(edges):
        if node not in index:
            visit(node)
    return found
