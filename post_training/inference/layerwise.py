"""One decoder layer at a time: what the first gets, and what the next one gets from it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer

from post_training.distributed import memory
from post_training.inference import forward

# Positional ones after the hidden states, and those by name.
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
# A forward pre-hook.
Hook = Callable[[torch.nn.Module, tuple[Any, ...]], None]


class _ReachedError(Exception):
    """A forward pass came to the first layer; the rest is not needed."""


def other_arguments(core: Any, batch: torch.Tensor) -> list[Arguments]:
    """What each layer is called with beside the hidden states; the same for every batch.

    No layer is computed: they may be without weights.
    """
    seen: dict[int, Arguments] = {}

    def keep(n: int, layer: torch.nn.Module, *given: Any, **kwargs: Any) -> Any:
        hidden = given[0] if given else kwargs["hidden_states"]
        seen[n] = (given[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"})
        if n + 1 == len(core.decoder.layers):
            raise _ReachedError
        return (hidden, None) if isinstance(layer, TransformerLayer) else hidden

    with contextlib.ExitStack() as stack:
        for n, layer in enumerate(core.decoder.layers):
            layer.forward = partial(keep, n, layer)
            stack.callback(delattr, layer, "forward")
        stack.enter_context(contextlib.suppress(_ReachedError))
        forward.run(core, batch.to(forward.device_of(core)), torch.zeros_like(batch[:, 0]))
    return [seen[n] for n in range(len(core.decoder.layers))]


def first_inputs(core: Any, batches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Hidden states [s, b, h] that the first layer gets of each batch.

    They stay on the model's device where a quarter of its free memory holds them and what is
    computed of them, else in host memory.
    """
    kept: list[torch.Tensor] = []
    device = forward.device_of(core)
    place = torch.device("cpu")

    def keep(_module: torch.nn.Module, given: tuple[Any, ...], kwargs: Any) -> None:
        hidden = given[0] if given else kwargs["hidden_states"]
        kept.append(hidden.detach().to(place))
        raise _ReachedError

    with contextlib.ExitStack() as stack:
        stack.callback(
            core.decoder.layers[0].register_forward_pre_hook(keep, with_kwargs=True).remove
        )
        for batch in batches:
            with contextlib.suppress(_ReachedError):
                forward.run(core, batch.to(device), None)
            if len(kept) == 1 and fits(2 * len(batches) * kept[0].nbytes, device):
                place = device
                kept[0] = kept[0].to(device)
    return kept


def fits(size: int, device: torch.device) -> bool:
    """Whether ``size`` bytes are a small part of the device's free memory."""
    return device.type == "cuda" and 4 * size < memory.free(device)


def outputs(
    layer: torch.nn.Module, states: Sequence[torch.Tensor], others: Arguments
) -> list[torch.Tensor]:
    """The layer's output for each hidden states, where these are."""
    return [run(layer, hidden, others).to(hidden.device) for hidden in states]


def observe(
    layer: torch.nn.Module,
    states: Sequence[torch.Tensor],
    others: Arguments,
    hooks: Sequence[tuple[torch.nn.Module, Hook]],
    *,
    to_end: bool = False,
) -> None:
    """Run the layer for each hidden states, and tell each hook its module's positional arguments.

    What comes after a single module is not computed, unless ``to_end`` says that it is called
    more than once; with several, experts say, which of them are called and in what order is the
    data's choice.
    """

    def last(module: torch.nn.Module, given: tuple[Any, ...]) -> None:
        hooks[0][1](module, given)
        raise _ReachedError

    alone = len(hooks) == 1 and not to_end
    with contextlib.ExitStack() as stack:
        for module, hook in hooks:
            stack.callback(module.register_forward_pre_hook(last if alone else hook).remove)
        for hidden in states:
            with contextlib.suppress(_ReachedError):
                run(layer, hidden, others)


def run(layer: torch.nn.Module, hidden: torch.Tensor, others: Arguments) -> torch.Tensor:
    """The layer's output for hidden states [s, b, h], on its device."""
    given, kwargs = others
    hidden = hidden.to(next(layer.parameters()).device)
    if given or "hidden_states" in kwargs:
        output = layer(hidden, *given, **kwargs)
    else:
        output = layer(hidden_states=hidden, **kwargs)
    return output[0] if isinstance(output, tuple) else output
