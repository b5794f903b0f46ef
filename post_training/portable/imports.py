"""How the stand-ins reach the import system, with nothing on ``sys.path``.

Packages of ``site/`` are loaded by their path; their submodules are then found as usual.
A meta-path finder runs registered functions on a module right after its code ran, so that importing
megatron-core lazily stays possible and names imported ``from`` a changed module are the changed
ones.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import torch

SITE = Path(__file__).parent / "site"

Change = Callable[[ModuleType], None]


class _ChangingLoader(Loader):
    """Runs a module with its own loader, then the changes registered for it."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # From here on the module looks as if its own loader had been asked directly.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        for prepare in _preparations.get(module.__name__, ()):
            prepare()
        self._loader.exec_module(module)
        for change in _changes[module.__name__]:
            change(module)


class _ChangingFinder(MetaPathFinder):
    """Wraps the loader of every module that a change is registered for."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _changes:
            return None
        for finder in sys.meta_path:
            if finder is self:
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _ChangingLoader(spec.loader)
                return spec
        return None


_changes: dict[str, list[Change]] = {}
_preparations: dict[str, list[Callable[[], None]]] = {}


def why_not_on_gpu(package: str) -> str:
    """Why the kernels of ``package`` cannot run here; empty if they can."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    return ""


def load_stand_in(package: str) -> None:
    """Import the stand-in of that name, whatever else is installed."""
    folder = SITE / package
    spec = importlib.util.spec_from_file_location(
        package, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    sys.modules[package] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[package])


def on_import(name: str, change: Change, *, before: Callable[[], None] | None = None) -> None:
    """Call ``change(module)`` after each import of the module ``name``, and now if it is there.

    Args:
        before: called before the module's code runs.
    """
    _changes.setdefault(name, []).append(change)
    if before is not None:
        _preparations.setdefault(name, []).append(before)
    if not any(isinstance(finder, _ChangingFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _ChangingFinder())
    if name in sys.modules:
        change(sys.modules[name])
