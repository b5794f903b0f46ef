"""Formats that ModelOpt cannot calibrate, or not save, in this layout. No torch."""

from __future__ import annotations

import importlib.util

from post_training.common.errors import UsageError
from post_training.distributed.parallel import Parallel
from post_training.quantization import gptq_checks
from post_training.quantization.formats import exportable
from post_training.quantization.formats import registry as formats
from post_training.quantization.formats.base import AWQ, GPTQ, Format


def check(
    choice: Format,
    what: str,
    sizes: Parallel,
    *,
    packed: bool,
    synced: bool,
    allow_unexportable: bool,
) -> None:
    """Refuse a format that ModelOpt cannot calibrate, or not save, in this layout.

    Args:
        what: names the format in a message.
        packed: weights are saved in their low-bit form.
        synced: experts of a layer share their scales.
        allow_unexportable: rotated keys are asked for in spite of the engines.
    """
    if choice.broken:
        raise UsageError(what, choice.broken, "choose another format (docs/formats.md)")
    if choice.kv == "nvfp4_rotate" and allow_unexportable:
        require_hadamard(what)
    ranks, replicas = sizes.tensor, sizes.data
    if ranks > 1 and choice.linear and formats.WEIGHTS[choice.linear.weight].stored_block_scales:
        raise exportable.unsavable(what, ranks)
    if packed and choice.linear and formats.WEIGHTS[choice.weight].parts:
        raise exportable.packed_twice(what)
    if ranks > 1 and packed and formats.packs_by_rank(choice.weight):
        raise exportable.unpackable(what, ranks)
    if choice.method == GPTQ:
        gptq_checks.check(what, sizes, packed=packed, synced=synced)
    if choice.method in ("local_hessian", *AWQ) and replicas > 1:
        raise UsageError(
            f"{what} with DP={replicas}",
            "ModelOpt adds up neither Hessians nor losses of the replicas, whose scales would "
            "differ",
            "set DP=1; PP may be larger",
        )


def require_hadamard(what: str) -> None:
    if importlib.util.find_spec("fast_hadamard_transform") is None:
        raise UsageError(
            what,
            "ModelOpt rotates with the package fast_hadamard_transform, which is not installed",
            "install it (it needs CUDA), or use fp8 or nvfp4",
        )
