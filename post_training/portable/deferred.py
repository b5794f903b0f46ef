"""What importing megatron-core and ModelOpt prepares, prepared when it is used for the first time.

On a GPU ``torch.compile`` as a decorator imports the compiler, and ModelOpt's histograms, which no
format here calibrates with, import ``scipy.stats``: 3 and 2 s of a core.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from post_training.portable import imports

_STATISTICS = "scipy.stats"


def install() -> None:
    """Defer both from here on. Idempotent by ``portable.install``."""
    imports.on_import("megatron.core.jit", _change_jit)
    imports.on_import("modelopt.torch.quantization.calib.histogram", _forget, before=_stand_in)


def compiled_when_called(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile`` of ``function``, from its first call on."""

    @functools.cache
    def compiled() -> Callable[..., Any]:
        return torch.compile(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return compiled()(*args, **kwargs)

    return call


def _change_jit(module: ModuleType) -> None:
    vars(module)["jit_fuser"] = compiled_when_called


def _entropy(*args: Any, **kwargs: Any) -> Any:
    return importlib.import_module(_STATISTICS).entropy(*args, **kwargs)


def _stand_in() -> None:
    if _STATISTICS not in sys.modules:
        sys.modules[_STATISTICS] = ModuleType(_STATISTICS)
        vars(sys.modules[_STATISTICS])["entropy"] = _entropy


def _forget(_: ModuleType) -> None:
    if getattr(sys.modules.get(_STATISTICS), "entropy", None) is _entropy:
        del sys.modules[_STATISTICS]
