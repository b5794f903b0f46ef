"""A model taken apart: its embedding, each decoder layer, and what follows the last one.

A part is a model of its own, like a pipeline stage, and shares its modules with the whole model.
That may be too large for any memory: it is built without weights, and one part at a time has its
tensors (:func:`materialize`) and gives them back (:func:`release`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch

_AROUND = ("final_layernorm", "final_norm")  # of the decoder, after its layers


@dataclass(frozen=True)
class Part:
    """A part of a model.

    Attributes:
        model: of the part's modules alone.
        layer: the decoder layer; None of the parts before and after the layers.
    """

    model: Any
    layer: Any = None


def of(model: Any) -> list[Part]:
    """The parts of a model on one pipeline stage, in the order in which data passes them."""
    layers = model.decoder.layers
    return [
        Part(_with(model, ("embedding",), (), first=True)),
        *(Part(_with(model, (), (layer,)), layer) for layer in layers),
        Part(_with(model, ("output_layer",), (), last=True)),
    ]


def end_of(model: Any) -> Any:
    """What follows the last layer, as a model that is given hidden states (``decoder_input``).

    A tied output layer multiplies by the embedding's weight, which comes along.
    """
    tied = model.share_embeddings_and_output_weights
    names = ("embedding", "output_layer") if tied else ("output_layer",)
    return _with(model, names, (), first=True, last=True)


def _with(
    model: Any,
    names: Collection[str],
    layers: Collection[Any],
    *,
    first: bool = False,
    last: bool = False,
) -> Any:
    """A model that shares the modules ``names`` and ``layers``, and rotary embeddings."""
    part, decoder = _copy(model), _copy(model.decoder)
    for owner, kept in ((part, names), (decoder, _AROUND if last else ())):
        for name, module in list(owner._modules.items()):
            has_weights = any(True for _ in module.parameters()) if module is not None else False
            if (has_weights or isinstance(module, torch.nn.ModuleList)) and name not in kept:
                del owner._modules[name]
    decoder._modules["layers"] = torch.nn.ModuleList(layers)
    part._modules["decoder"] = decoder
    for owner in (part, decoder):
        owner.pre_process, owner.post_process = first, last
    return part


def _copy(module: Any) -> Any:
    """The same module with a list of submodules of its own."""
    found = copy.copy(module)
    found.__dict__["_modules"] = dict(module._modules)
    return found


def materialize(module: torch.nn.Module, device: torch.device | None = None) -> None:
    """Allocate every meta tensor, uninitialized; by default on this rank's device.

    Attributes that mcore puts on parameters (``tensor_model_parallel`` and so on) are kept, which
    ``Module.to_empty`` would drop.
    """
    there = device or default_device()
    _change(module, lambda t: torch.empty_like(t, device=there) if t.is_meta else t.to(there))


def release(module: torch.nn.Module) -> None:
    """Give the memory of all tensors back; scales of quantizers go too."""
    _change(module, lambda t: t.to("meta"))


def share(one: torch.nn.Module, other: torch.nn.Module) -> None:
    """Give ``other``, which has the same modules and more, the tensors of ``one``."""
    for name, module in one.named_modules():
        there: Any = other.get_submodule(name)
        for mine, its in (
            (module._parameters, there._parameters),
            (module._buffers, there._buffers),
        ):
            for key, tensor in mine.items():
                dict.__setitem__(its, key, tensor)


def default_device() -> torch.device:
    """This rank's."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _change(module: torch.nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    done: dict[int, Any] = {}
    for tensors, name, tensor in list(_tensors(module)):
        if id(tensor) not in done:
            new = change(tensor.detach())
            if isinstance(tensor, torch.nn.Parameter):
                new = torch.nn.Parameter(new, requires_grad=tensor.requires_grad)
                vars(new).update(vars(tensor))
            done[id(tensor)] = new
        # ModelOpt's own dictionary of parameters would pack a weight.
        dict.__setitem__(tensors, name, done[id(tensor)])


def _tensors(module: torch.nn.Module) -> Iterator[tuple[dict[str, Any], str, torch.Tensor]]:
    for each in module.modules():
        for tensors in (each._parameters, each._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    yield tensors, name, tensor
