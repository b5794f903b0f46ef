"""Linear layers of the model whose rows a family's files hold in several, or in another order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from post_training.export.folder import Tensors


class Dividing:
    """Names and rows of what the rules give as a whole.

    Args:
        divided: by name of the whole, its parts and their rows (``Family.divided``).
    """

    def __init__(self, divided: Mapping[str, Mapping[str, Sequence[int]]]) -> None:
        self._rows = {
            whole: {part: torch.tensor(rows) for part, rows in parts.items()}
            for whole, parts in divided.items()
        }

    def modules(self, name: str) -> list[str]:
        """The names of the linear layers that hold the rows of ``name``, which may be itself."""
        ending = "." if name.endswith(".") else ""
        parent, dot, own = name.removesuffix(".").rpartition(".")
        return [f"{parent}{dot}{part}{ending}" for part in self._rows.get(own, [own])]

    def tensors(self, group: Tensors) -> Tensors:
        """One layer's tensors; scales of a whole tensor become those of each part.

        Raises:
            ValueError: for scales that belong to other rows than one or all.
        """
        found: Tensors = {}
        for name, tensor in group.items():
            module, _, kind = name.rpartition(".")
            parts = self._rows.get(module.rpartition(".")[2])
            if parts is None:
                found[name] = tensor
                continue
            total = sum(map(len, parts.values()))
            for part, rows in zip(self.modules(module), parts.values(), strict=True):
                if tensor.numel() > 1 and len(tensor) != total:
                    raise ValueError(f"{name} has {len(tensor)} rows, the layer {total}")
                whole = tensor.numel() == 1
                found[f"{part}.{kind}"] = (
                    tensor.clone() if whole else tensor[rows.to(tensor.device)]
                )
        return found
