"""Optimizer and random states as megatron-core's sharded state, saved and restored.

The optimizer's state has the shapes of the parameters, so that it loads at another layout.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE
from megatron.core.tensor_parallel import get_cuda_rng_tracker

# Tensors in the shapes of the parameters.
_SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}


def optimizer_state(
    optimizer: Any,
    tensors: Mapping[str, Any],
    metadata: Mapping[str, Any],
    step: int,
    is_loading: bool = False,
) -> Any:
    """The optimizer's sharded state; of a pipeline stage that trains nothing, too.

    megatron-core (distrib_optimizer.py, state_dict) wants a parameter to read the step from. What
    rank 0, which may train nothing, says of the parameter groups is what every rank loads.
    """
    if _trains_something(optimizer):
        if is_loading:
            for each in _parts(optimizer):
                # PyTorch's Adam has no state before its first step, and state_dict wants one.
                if not each.optimizer.state:
                    each._init_optimizer_states_with_dummy_values()
        return optimizer.sharded_state_dict(
            tensors, is_loading=is_loading, metadata={**metadata, **_SHARDING}
        )
    groups = _parts(optimizer)[0].optimizer.state_dict()["param_groups"]
    for group in groups:
        del group["params"]
        group["step"] = step if HAVE_APEX_OR_TE else float(step)
    return {
        "optimizer": {"param_groups": groups},
        "param_state": {},
        "param_state_sharding_type": _SHARDING["distrib_optim_sharding_type"],
    }


def _parts(optimizer: Any) -> list[Any]:
    """The optimizers that megatron-core chains, of which each wraps one of PyTorch's."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def restore_optimizer(optimizer: Any, state: Any) -> None:
    """Load what :func:`optimizer_state` describes; nothing where nothing is trained.

    megatron-core (distrib_optimizer.py) does not expect PyTorch's Adam there: it looks for each
    parameter's step among the tensors, where it is not, and gives all parameters one step tensor,
    which every parameter then increases. So the tensors are loaded while the steps are numbers, and
    each parameter gets a step of its own.
    """
    if not _trains_something(optimizer):
        return
    parts = _parts(optimizer)
    states = [state] if len(parts) == 1 else [state[i] for i in range(len(parts))]
    for each, content in zip(parts, states, strict=True):
        rest = {name: value for name, value in content.items() if name != "param_state"}
        each.load_state_dict(rest)
        counted = [own for own in each.optimizer.state.values() if torch.is_tensor(own.get("step"))]
        for own in counted:
            own["step"] = float(own["step"])
        each.load_parameter_state_from_fully_reshardable(content["param_state"])
        for own in counted:
            own["step"] = torch.tensor(own["step"], dtype=torch.float32)


def _trains_something(optimizer: Any) -> bool:
    return any(group["params"] for group in optimizer.param_groups)


def sharded_random_state() -> Any:
    """This rank's random states, as one object of its place among all ranks."""
    state = {
        "random": random.getstate(),
        "numpy": numpy.random.get_state(),
        "torch": torch.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return ShardedObject("rng_state", state, (ranks,), (rank,), replica_id=0)


def set_random_state(state: Mapping[str, Any]) -> None:
    """Give this rank the states of :func:`sharded_random_state`."""
    random.setstate(state["random"])
    numpy.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    get_cuda_rng_tracker().set_states(state["tracker"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
