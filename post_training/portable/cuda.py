"""Stand-ins for the CUDA and NCCL calls that megatron-core and ModelOpt make without need.

Active only where there is no CUDA device (:func:`install` is then called by
``portable.install``). Five kinds:

1. Functions of ``torch.cuda`` and methods of ``Tensor``: the CPU answers. There is one generator,
   the CPU's, and work is done when a call returns, so streams and events are empty.
2. Functions of megatron-core that insist on a CUDA tensor or generator.
3. Literal ``device="cuda"`` arguments in modules of megatron-core: those modules see ``torch``
   through :class:`_TorchOnCpu`, which sends such tensors to the CPU. ``torch`` itself is unchanged.
4. A collective that NCCL takes and gloo refuses.
5. ``torch.compile``, by which the two fuse functions for GPUs.

Paths in comments are below ``megatron/core`` (0.19.2) or, where said, ``modelopt/torch`` (0.47.0).
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from post_training.portable import imports

CPU = torch.device("cpu")


class _Stream:
    """The one stream of the CPU, and an event on it: work is done when its call returns.

    Mixtures of experts copy counts on a stream of their own (transformer/moe/token_dispatcher.py
    :469, :922-950), shared experts may run on one (transformer/moe/shared_experts.py:192-362).
    """

    def wait_stream(self, stream: object) -> None:
        pass

    def record_event(self) -> _Stream:
        return self

    def synchronize(self) -> None:
        pass

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    def __hash__(self) -> int:
        return 0


def _mem_get_info(device: object = None) -> tuple[int, int]:
    """(available, total) memory of this host in bytes."""
    import psutil

    memory = psutil.virtual_memory()
    return int(memory.available), int(memory.total)


_TORCH_CUDA: dict[str, Any] = {
    # Everywhere a tensor is made: tensor_parallel/layers.py:647, transformer/attention.py:530, ...
    "current_device": lambda: CPU,
    # dist_checkpointing/strategies/filesystem_async.py:248, transformer/utils.py:283.
    "synchronize": lambda device=None: None,
    # ModelOpt's report_memory (utils/perf.py:65), during AutoQuantize.
    "mem_get_info": _mem_get_info,
    # tensor_parallel/random.py:303-306 and :490.
    "get_rng_state": lambda device="cuda": torch.get_rng_state(),
    "manual_seed": lambda seed: torch.default_generator.manual_seed(int(seed)),
    # Mixtures of experts, see _Stream; distributed/param_and_grad_buffer.py:632.
    "Stream": _Stream,
    "stream": contextlib.nullcontext,
    "current_stream": lambda device=None: _Stream(),
}


def _tensor_cuda(self: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
    """optimizer/distrib_optimizer.py:1374; ModelOpt's prune/plugins/mcore_minitron.py:185."""
    return self


_type_of_tensor = torch.Tensor.type


def _tensor_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """``Tensor.type``, except that megatron-core's optimizers read "torch.cuda.FloatTensor".

    They compare the name with those of CUDA tensors and refuse others (optimizer/optimizer.py
    :1009-1038, distrib_optimizer.py:401-482, clip_grads.py:174), though nothing in them depends on
    it. The caller's module decides, so that no one else reads a false name.
    """
    name = _type_of_tensor(self, *args, **kwargs)
    caller = sys._getframe(1).f_globals.get("__name__", "")
    if isinstance(name, str) and caller.startswith("megatron.core.optimizer"):
        return name.replace("torch.", "torch.cuda.")
    return name


_all_gather_into_tensor = torch.distributed.all_gather_into_tensor


def _gather_scalars(
    output_tensor: torch.Tensor, input_tensor: torch.Tensor, *args: Any, **kwargs: Any
) -> Any:
    """``all_gather_into_tensor`` that takes a 0-dimensional input of each rank as [1].

    ModelOpt gathers so the number of layers that each pipeline stage keeps
    (prune/plugins/mcore_minitron.py:187, ``drop_mcore_language_model_layers``).
    """
    return _all_gather_into_tensor(output_tensor, torch.atleast_1d(input_tensor), *args, **kwargs)


_compile = torch.compile


def _compile_others(model: Any = None, **options: Any) -> Any:
    """``torch.compile``, except that functions of megatron-core and ModelOpt stay as they are.

    They compile wherever they define what a GPU runs fused (jit.py:21, transformer/moe/router.py
    :918, ModelOpt's quantization/algorithms.py:1746). That alone imports Inductor, 1.5 s of every
    start, and a call would need a C++ compiler.
    """
    caller = sys._getframe(1).f_globals.get("__name__", "")
    if not caller.startswith(("megatron.core.", "modelopt.")):
        return _compile(model, **options)
    return (lambda function: function) if model is None else model


class _TorchOnCpu(ModuleType):
    """``torch`` as seen by one module: factories take ``device="cuda"`` for the CPU."""

    def __init__(self) -> None:
        super().__init__("torch")
        vars(self).update(vars(torch))
        for factory in (torch.ones, torch.tensor, torch.zeros):
            vars(self)[factory.__name__] = _on_cpu(factory)

    def __getattr__(self, name: str) -> Any:
        # Attributes that torch loads lazily.
        return getattr(torch, name)


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = CPU
        return factory(*args, **kwargs)

    return create


# Modules with a literal device="cuda" on a path that this repository takes, and where it is.
_MODULES_WITH_CUDA_LITERALS = (
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",  # :204, every save
    "megatron.core.distributed.param_and_grad_buffer",  # :1145
    "megatron.core.optimizer.clip_grads",  # :96-112, :180
    "megatron.core.optimizer.optimizer",  # :315, :690-702, :1249
    "megatron.core.pipeline_parallel.schedules",  # :749, :1121, :2292
    "megatron.core.transformer.utils",  # :39, :44, masks of core attention without fusion (gpt-oss)
    "megatron.core.utils",  # :1332, the norm of gradients
)


def _see_torch_on_cpu(module: ModuleType) -> None:
    vars(module)["torch"] = _TorchOnCpu()


def _is_no_false_alarm(record: logging.LogRecord) -> bool:
    """Drops the warning that the CPU's generator was used where the GPU's was meant: it is both."""
    return "CPU RNG state changed within GPU RNG context" not in str(record.msg)


def _change_random(module: ModuleType) -> None:
    """tensor_parallel/random.py:104 and :135 read and set the generator of a GPU."""

    def get(device: object = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    def set_(new_state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    vars(module).update(_get_cuda_rng_state=get, _set_cuda_rng_state=set_)
    logging.getLogger(module.__name__).addFilter(_is_no_false_alarm)


def _change_moe_utils(module: ModuleType) -> None:
    """transformer/moe/moe_utils.py:1169 turns only what comes from a GPU into a numpy array."""

    def maybe_move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    vars(module)["maybe_move_tensor_to_cpu"] = maybe_move


def install() -> None:
    """Put all stand-ins in place. Call it only where there is no CUDA device."""
    vars(torch.cuda).update(_TORCH_CUDA)
    torch.Tensor.cuda = _tensor_cuda  # type: ignore[method-assign, assignment]
    torch.Tensor.type = _tensor_type  # type: ignore[method-assign, assignment]
    torch.distributed.all_gather_into_tensor = _gather_scalars
    torch.compile = _compile_others
    imports.on_import("megatron.core.tensor_parallel.random", _change_random)
    imports.on_import("megatron.core.transformer.moe.moe_utils", _change_moe_utils)
    for name in _MODULES_WITH_CUDA_LITERALS:
        imports.on_import(name, _see_torch_on_cpu)
