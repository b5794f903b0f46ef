"""Random states, recomputation, and the collectives of tensor-parallel linears."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint as torch_checkpoint

__all__ = [
    "CudaRNGStatesTracker",
    "activation_recompute_forward",
    "all_reduce",
    "checkpoint",
    "gather_along_first_dim",
    "get_all_rng_states",
    "in_fp8_activation_recompute_phase",
    "is_fp8_activation_recompute_enabled",
    "reduce_scatter_along_first_dim",
]

_all_states: dict[str, torch.Tensor] = {}


def _get_state() -> torch.Tensor:
    return torch.cuda.get_rng_state() if torch.cuda.is_available() else torch.get_rng_state()


def _set_state(state: torch.Tensor) -> None:
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(state)
    else:
        torch.set_rng_state(state)


def get_all_rng_states() -> dict[str, torch.Tensor]:
    """States of every tracker by name."""
    return _all_states


class CudaRNGStatesTracker:
    """Named states of the device's generator, each entered with :meth:`fork`."""

    def __init__(self) -> None:
        self.states_: dict[str, torch.Tensor] = {}
        self.seeds_: set[int] = set()

    def reset(self) -> None:
        self.states_ = {}
        self.seeds_ = set()

    def get_states(self) -> dict[str, torch.Tensor]:
        return dict(self.states_)

    def set_states(self, states: dict[str, torch.Tensor]) -> None:
        self.states_ = states

    def add(self, name: str, seed: int) -> None:
        """Name the state that ``seed`` gives.

        Raises:
            RuntimeError: if the name or the seed is taken.
        """
        if seed in self.seeds_ or name in self.states_:
            raise RuntimeError(f"random state {name!r} or seed {seed} is in use already")
        self.seeds_.add(seed)
        before = _get_state()
        if torch.cuda.is_available():
            torch.cuda.manual_seed(seed)
        else:
            torch.default_generator.manual_seed(seed)
        self.states_[name] = _all_states[name] = _get_state()
        _set_state(before)

    @contextlib.contextmanager
    def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
        """Draw from the named state inside the context.

        Raises:
            RuntimeError: if there is no such name.
        """
        if name not in self.states_:
            raise RuntimeError(f"random state {name!r} was never added")
        before = _get_state()
        _set_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = _all_states[name] = _get_state()
            _set_state(before)


def checkpoint(
    function: Callable[..., Any],
    *args: Any,
    distribute_saved_activations: bool = False,
    get_rng_state_tracker: Callable[[], Any] | None = None,
    tp_group: dist.ProcessGroup | None = None,
    use_reentrant: bool = True,
    **kwargs: Any,
) -> Any:
    """Call ``function`` now and again in the backward pass instead of keeping its activations.

    ``distribute_saved_activations`` only saves memory in the real package and is ignored.
    """
    context: Any = contextlib.nullcontext
    if get_rng_state_tracker is not None:
        context = _restored_tracker(get_rng_state_tracker())

    first = True

    def call(*inputs: Any) -> Any:
        nonlocal first
        if first:
            first = False
            return function(*inputs, **kwargs)
        with context():
            return function(*inputs, **kwargs)

    return torch_checkpoint(call, *args, use_reentrant=False)


def _restored_tracker(tracker: Any) -> Callable[[], Any]:
    """A context in which the tracker has the states of now."""
    states = tracker.get_states()

    @contextlib.contextmanager
    def restored() -> Iterator[None]:
        current = tracker.get_states()
        tracker.set_states(dict(states))
        try:
            yield
        finally:
            tracker.set_states(current)

    return restored


@contextlib.contextmanager
def activation_recompute_forward(
    activation_recompute: bool = False, recompute_phase: bool = False
) -> Iterator[None]:
    """Marks FP8 recomputation in the real package; nothing to mark here."""
    yield


def is_fp8_activation_recompute_enabled() -> bool:
    return False


def in_fp8_activation_recompute_phase() -> bool:
    return False


def all_reduce(tensor: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Sum over the group, in place if the tensor is contiguous."""
    if group is None or group.size() == 1:
        return tensor
    tensor = tensor.contiguous()
    dist.all_reduce(tensor, group=group)
    return tensor


def gather_along_first_dim(tensor: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Concatenate the ranks' tensors: [s / n, ...] to [s, ...]."""
    if group is None or group.size() == 1:
        return tensor
    gathered = tensor.new_empty((tensor.shape[0] * group.size(), *tensor.shape[1:]))
    dist.all_gather_into_tensor(gathered, tensor.contiguous(), group=group)
    return gathered


def reduce_scatter_along_first_dim(
    tensor: torch.Tensor, group: dist.ProcessGroup | None
) -> torch.Tensor:
    """Sum over the group and keep this rank's part: [s, ...] to [s / n, ...]."""
    if group is None or group.size() == 1:
        return tensor
    part = tensor.new_empty((tensor.shape[0] // group.size(), *tensor.shape[1:]))
    dist.reduce_scatter_tensor(part, tensor.contiguous(), group=group)
    return part
