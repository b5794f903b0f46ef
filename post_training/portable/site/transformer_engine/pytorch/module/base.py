"""What all modules share: extra state, groups, initialisation of parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["TransformerEngineBaseModule", "get_dummy_wgrad", "get_workspace"]

_workspace: dict[torch.device, torch.Tensor] = {}


def get_workspace() -> torch.Tensor:
    """A buffer for products; nothing here uses it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device not in _workspace:
        _workspace[device] = torch.empty(0, dtype=torch.uint8, device=device)
    return _workspace[device]


def get_dummy_wgrad(shape: list[int], dtype: torch.dtype, zero: bool = False) -> torch.Tensor:
    """A gradient that only triggers hooks, where the true one was added to ``main_grad``."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.zeros(shape, dtype=dtype, device=device)


class TransformerEngineBaseModule(torch.nn.Module):
    """Base of the modules.

    Extra state is defined on the class: ``torch`` looks for it there, and only then puts the
    ``_extra_state`` keys into state dicts that Transformer Engine has and in which ModelOpt keeps
    the state of quantizers.
    """

    tp_group: dist.ProcessGroup | None

    def __init__(self) -> None:
        super().__init__()
        self.fp8 = False
        self.fp8_initialized = False
        self.fp8_calibration = False
        self.fp8_parameters = False
        self.fp8_meta: dict[str, Any] = {"fp8_checkpoint": False, "recipe": None}
        self.tp_group = None
        self.tp_size = 1

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        """There is no FP8 state to initialise."""

    def get_extra_state(self) -> torch.Tensor:
        """An empty byte tensor: no FP8 state."""
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        """Accept the extra state of a checkpoint; FP8 scales in it have no use here."""

    def set_tensor_parallel_group(self, tp_group: dist.ProcessGroup | None) -> None:
        self.tp_group = tp_group

    def backward_dw(self) -> None:
        """Weight gradients are never delayed."""


def fill(
    parameter: torch.nn.Parameter,
    init_method: Callable[[torch.Tensor], Any],
    get_rng_state_tracker: Callable[[], Any] | None,
    rng_tracker_name: str | None,
) -> None:
    """Initialise ``parameter`` in place, with the tracker's state if there is one."""
    if parameter.is_meta:
        return
    context: Any = contextlib.nullcontext()
    if get_rng_state_tracker is not None:
        tracker = get_rng_state_tracker()
        context = tracker.fork(rng_tracker_name) if rng_tracker_name else tracker.fork()
    with torch.no_grad(), context:
        init_method(parameter)


def default_init(weight: torch.Tensor) -> None:
    torch.nn.init.normal_(weight, mean=0.0, std=0.023)


def mark(
    parameter: torch.nn.Parameter, parallel: bool, dimension: int, sequence_parallel: bool
) -> None:
    """Set the attributes by which megatron-core knows how a parameter is split."""
    vars(parameter).update(
        tensor_model_parallel=parallel,
        partition_dim=dimension,
        partition_stride=1,
        sequence_parallel=sequence_parallel,
    )
