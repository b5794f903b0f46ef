"""What lets megatron-core and ModelOpt run on machines that lack CUDA or Transformer Engine.

It holds stand-ins and nothing else; no feature of this repository lives here.

- ``cuda``: the few CUDA and NCCL calls that the two packages make without need, on the CPU.
- ``site/transformer_engine``: a pure-PyTorch package in the shape of Transformer Engine.
- ``site/mamba_ssm``, ``mamba``: the scan and the steps of Mamba-2 layers without their kernels.
- ``delta_rule``: the recurrence of gated delta nets without the kernels of ``fla``.
- ``quantization``: the block formats of ModelOpt (NVFP4, MXFP8, ...) without its CUDA kernels.
- ``imports``: how the above reach the import system.
- ``deferred``: what the two prepare while they are imported, prepared at its first use instead.
- ``left_out``: plugins of ModelOpt that nothing here needs, and that take long to import.

Call :func:`install` once, before ``megatron.core`` or ``modelopt`` is imported::

    from post_training import portable

    print(portable.install())
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import sys
from dataclasses import dataclass

import torch

from post_training.portable import (
    cuda,
    deferred,
    delta_rule,
    imports,
    left_out,
    mamba,
    quantization,
)

logger = logging.getLogger(__name__)

STAND_IN = "pure-PyTorch stand-in"


@dataclass(frozen=True)
class PortableReport:
    """Which implementations run in this process.

    Attributes:
        transformer_engine: ``"transformer_engine 2.x"`` (the installed package and its version) or
            ``"pure-PyTorch stand-in"``.
        transformer_engine_version: the version that megatron-core sees.
        cuda_stand_ins: whether ``torch.cuda`` calls are answered by the CPU.
        reason: why the stand-in runs, empty for the real package.
    """

    transformer_engine: str
    transformer_engine_version: str
    cuda_stand_ins: bool
    reason: str = ""

    @property
    def real_transformer_engine(self) -> bool:
        return self.transformer_engine != STAND_IN

    def __str__(self) -> str:
        engine = self.transformer_engine
        if not self.real_transformer_engine:
            engine += f" {self.transformer_engine_version} ({self.reason})"
        device = "CPU stand-ins for torch.cuda" if self.cuda_stand_ins else "CUDA"
        return f"Transformer Engine: {engine}; device calls: {device}"


@functools.cache
def install() -> PortableReport:
    """Make ``megatron.core`` and ``modelopt`` importable and runnable here. Idempotent.

    The real Transformer Engine runs where it can be imported and a GPU is there (its modules have
    no CPU code); anywhere else the stand-in is put on the import path. The ``torch.cuda``
    stand-ins are active only if ``torch.cuda.is_available()`` is false. Changes that belong to a
    module of megatron-core or ModelOpt are made when that module is imported.

    Raises:
        RuntimeError: if ``megatron.core`` was imported before the first call without a Transformer
            Engine: it has then chosen its classes already.
    """
    reason = _why_not_real()
    if reason:
        extension = sys.modules.get("megatron.core.extensions.transformer_engine")
        if extension is not None and not extension.HAVE_TE:
            raise RuntimeError(
                "post_training.portable.install() was called after megatron.core was imported "
                "without Transformer Engine: call it before the first import of megatron.core or "
                "modelopt"
            )
        imports.load_stand_in("transformer_engine")
    engine = importlib.import_module("transformer_engine")
    name = STAND_IN if reason else f"transformer_engine {engine.__version__}"
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        cuda.install()
    quantization.install()
    mamba.install()
    delta_rule.install()
    left_out.install()
    deferred.install()
    return PortableReport(name, str(engine.__version__), on_cpu, reason)


def _why_not_real() -> str:
    """Why the real Transformer Engine cannot run here; empty if it can."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if importlib.util.find_spec("transformer_engine") is None:
        return "transformer_engine is not installed"
    try:
        importlib.import_module("transformer_engine.pytorch")
    except (ImportError, OSError, RuntimeError) as error:
        logger.warning("the installed transformer_engine cannot be imported: %s", error)
        for name in [each for each in sys.modules if each.split(".")[0] == "transformer_engine"]:
            del sys.modules[name]
        return f"the installed one cannot be imported: {error}"
    return ""
