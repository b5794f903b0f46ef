"""Plugins of ModelOpt for models of transformers, diffusers and others, which are not imported.

Every model here is megatron-core's. ModelOpt imports a plugin wherever its package is installed:
trainers, data sets and compressed-tensors come with those of transformers, 1,492 of 5,679 modules
and 2.0 of 5.3 s of a core. A plugin whose import says that there is no such module is passed over
in silence.
"""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Sequence
from types import ModuleType

_PREFIX = "modelopt.torch."
NAMES = frozenset(
    _PREFIX + name
    for name in """
    distill.plugins.huggingface
    opt.plugins.diffusers opt.plugins.peft opt.plugins.transformers
    quantization.plugins.accelerate quantization.plugins.diffusion quantization.plugins.huggingface
    quantization.plugins.peft quantization.plugins.pytorch_geometric
    quantization.plugins.transformers
    quantization.plugins.transformers_trainer quantization.plugins.trl quantization.plugins.vllm
    speculative.plugins.hf_dflash
    """.split()
)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> None:
        if fullname in NAMES:
            raise ModuleNotFoundError(f"{fullname} is left out here", name=fullname)


def install() -> None:
    """Leave them out from here on. Idempotent."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
