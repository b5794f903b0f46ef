"""Stand-ins for the ``torch.cuda`` calls that megatron-core and ModelOpt make without need.

Active only where there is no CUDA device (:func:`install` is then called by
``portable.install``). Three kinds:

1. Functions of ``torch.cuda`` and methods of ``Tensor`` and ``Module``: the CPU answers. There is
   one generator, the CPU's, and work is done when a call returns, so streams and events are empty.
2. Functions of megatron-core that insist on a CUDA tensor or generator.
3. Literal ``device="cuda"`` arguments in modules of the two packages: those modules see ``torch``
   through :class:`_TorchOnCpu`, which sends such tensors to the CPU. ``torch`` itself is unchanged.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch

from post_training.portable import imports

CPU = torch.device("cpu")


class _Event:
    """An event that has happened: work on the CPU is done when its call returns."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def record(self, stream: object = None) -> None:
        pass

    def wait(self, stream: object = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: object) -> float:
        raise RuntimeError("events of the CPU stand-in measure no time")


class _Stream:
    """The one stream of the CPU."""

    device = CPU
    cuda_stream = 0

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def wait_stream(self, stream: object) -> None:
        pass

    def wait_event(self, event: object) -> None:
        pass

    def record_event(self, event: _Event | None = None) -> _Event:
        return event if event is not None else _Event()

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    def __hash__(self) -> int:
        return 0

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, 0


def _nothing() -> Callable[..., None]:
    """A new function for a call that has no effect on the CPU.

    New each time: ``torch._dynamo`` tells the functions of ``torch`` apart by identity.
    """

    def nothing(*args: object, **kwargs: object) -> None:
        pass

    return nothing


def _empty_context() -> Callable[..., contextlib.AbstractContextManager[None]]:
    """A new context manager that does nothing, whatever its arguments."""

    @contextlib.contextmanager
    def context(*args: object, **kwargs: object) -> Iterator[None]:
        yield

    return context


def _mem_get_info(device: object = None) -> tuple[int, int]:
    """(available, total) memory of this host in bytes."""
    import psutil

    memory = psutil.virtual_memory()
    return int(memory.available), int(memory.total)


def _get_rng_state(device: object = "cuda") -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, device: object = "cuda") -> None:
    torch.set_rng_state(new_state)


def _manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(int(seed))


def _manual_seed_all(seed: int) -> None:
    torch.default_generator.manual_seed(int(seed))


_TORCH_CUDA: dict[str, Any] = {
    "current_device": lambda: CPU,
    "set_device": _nothing(),
    "synchronize": _nothing(),
    "mem_get_info": _mem_get_info,
    "get_rng_state": _get_rng_state,
    "set_rng_state": _set_rng_state,
    "manual_seed": _manual_seed,
    "manual_seed_all": _manual_seed_all,
    "initial_seed": lambda: torch.default_generator.initial_seed(),
    "Stream": _Stream,
    "Event": _Event,
    "stream": _empty_context(),
    "current_stream": lambda device=None: _Stream(),
    "default_stream": lambda device=None: _Stream(),
    "is_current_stream_capturing": lambda: False,
}
_RANDOM = ("get_rng_state", "set_rng_state", "manual_seed", "manual_seed_all", "initial_seed")


def _tensor_cuda(self: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
    return self


def _module_cuda(self: torch.nn.Module, device: object = None) -> torch.nn.Module:
    return self


_type_of_tensor = torch.Tensor.type


def _tensor_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """``Tensor.type``, except that megatron-core's optimizers read "torch.cuda.FloatTensor".

    They compare the name with those of CUDA tensors and refuse others, though nothing in them
    depends on it. The caller's module decides, so that no one else reads a false name.
    """
    name = _type_of_tensor(self, *args, **kwargs)
    caller = sys._getframe(1).f_globals.get("__name__", "")
    if isinstance(name, str) and caller.startswith("megatron.core.optimizer"):
        return name.replace("torch.", "torch.cuda.")
    return name


class _TorchOnCpu(ModuleType):
    """``torch`` as seen by one module: factories take ``device="cuda"`` for the CPU."""

    _FACTORIES = frozenset(
        "arange empty empty_like full full_like ones ones_like rand randint randn tensor "
        "zeros zeros_like".split()
    )

    def __init__(self) -> None:
        super().__init__("torch")
        vars(self).update(vars(torch))
        vars(self).update({name: _on_cpu(getattr(torch, name)) for name in self._FACTORIES})

    def __getattr__(self, name: str) -> Any:
        # Attributes that torch loads lazily.
        return getattr(torch, name)


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = CPU
        return factory(*args, **kwargs)

    return create


# Modules with a literal device="cuda" on a path that this repository takes.
_MODULES_WITH_CUDA_LITERALS = (
    "megatron.core.dist_checkpointing.exchange_utils",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
    "megatron.core.distributed.param_and_grad_buffer",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.grad_scaler",
    "megatron.core.optimizer.optimizer",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.rerun_state_machine",
    "megatron.core.tensor_parallel.data",
    "megatron.core.transformer.moe.token_dispatcher",
    "megatron.core.transformer.utils",
    "megatron.core.utils",
    "modelopt.torch.utils.plugins.megatron_mmlu",
)


def _see_torch_on_cpu(module: ModuleType) -> None:
    vars(module)["torch"] = _TorchOnCpu()


def _is_no_false_alarm(record: logging.LogRecord) -> bool:
    """Drops the warning that the CPU's generator was used where the GPU's was meant: it is both."""
    return "CPU RNG state changed within GPU RNG context" not in str(record.msg)


def _change_random(module: ModuleType) -> None:
    def get(device: object = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    def set_(new_state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    vars(module).update(_get_cuda_rng_state=get, _set_cuda_rng_state=set_)
    logging.getLogger(module.__name__).addFilter(_is_no_false_alarm)


def _change_communication(module: ModuleType) -> None:
    def is_there(tensor: torch.Tensor | None) -> None:
        if tensor is None:
            raise ValueError("a pipeline stage has no tensor to communicate")

    vars(module)["_is_cuda"] = is_there


def _change_moe_utils(module: ModuleType) -> None:
    def maybe_move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    vars(module)["maybe_move_tensor_to_cpu"] = maybe_move


def install() -> None:
    """Put all stand-ins in place. Call it only where there is no CUDA device."""
    for name, stand_in in _TORCH_CUDA.items():
        setattr(torch.cuda, name, stand_in)
    for name in _RANDOM:
        setattr(torch.cuda.random, name, _TORCH_CUDA[name])
    vars(torch.cuda.nvtx).update(
        range_push=_nothing(), range_pop=_nothing(), range=_empty_context(), mark=_nothing()
    )
    for owner, name, stand_in in (
        (torch.Tensor, "cuda", _tensor_cuda),
        (torch.Tensor, "record_stream", _nothing()),
        (torch.Tensor, "type", _tensor_type),
        (torch.nn.Module, "cuda", _module_cuda),
    ):
        setattr(owner, name, stand_in)
    imports.on_import("megatron.core.tensor_parallel.random", _change_random)
    imports.on_import("megatron.core.inference.communication_utils", _change_communication)
    imports.on_import("megatron.core.transformer.moe.moe_utils", _change_moe_utils)
    for name in _MODULES_WITH_CUDA_LITERALS:
        imports.on_import(name, _see_torch_on_cpu)
