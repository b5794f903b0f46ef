"""One decoder layer at a time: what the first gets, and what the next one gets from it."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

import torch

from post_training.inference import forward

# Positional ones after the hidden states, and those by name.
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class _ReachedError(Exception):
    """A forward pass came to the first layer; the rest is not needed."""


def other_arguments(core: Any, batch: torch.Tensor) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """What each layer is called with beside the hidden states; the same for every batch."""
    seen: dict[int, Arguments] = {}

    def keep(n: int, _module: torch.nn.Module, given: tuple[Any, ...], kwargs: Any) -> None:
        seen[n] = (given[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"})

    with contextlib.ExitStack() as stack:
        for n, layer in enumerate(core.decoder.layers):
            handle = layer.register_forward_pre_hook(partial(keep, n), with_kwargs=True)
            stack.callback(handle.remove)
        forward.run(core, batch.to(forward.device_of(core)), torch.zeros_like(batch[:, 0]))
    return [seen[n] for n in range(len(core.decoder.layers))]


def first_input(core: Any, batch: torch.Tensor) -> torch.Tensor:
    """Hidden states [s, b, h] that the first layer gets, in host memory."""
    kept = []

    def keep(_module: torch.nn.Module, given: tuple[Any, ...], kwargs: Any) -> None:
        hidden = given[0] if given else kwargs["hidden_states"]
        kept.append(hidden.detach().cpu())
        raise _ReachedError

    handle = core.decoder.layers[0].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        forward.run(core, batch.to(forward.device_of(core)), None)
    except _ReachedError:
        pass
    finally:
        handle.remove()
    return kept[0]


def run(
    layer: torch.nn.Module,
    states: list[torch.Tensor],
    given: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> list[torch.Tensor]:
    """The layer's output for each hidden states, in host memory."""
    device = next(layer.parameters()).device
    found = []
    for hidden in states:
        if given or "hidden_states" in kwargs:
            output = layer(hidden.to(device), *given, **kwargs)
        else:
            output = layer(hidden_states=hidden.to(device), **kwargs)
        found.append((output[0] if isinstance(output, tuple) else output).cpu())
    return found
