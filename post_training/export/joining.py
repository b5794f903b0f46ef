"""Linear layers that a family's files hold as one matrix, put together again on export."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from post_training.export.folder import Tensors


class Joining:
    """Renames and concatenates what the rules give in parts.

    Args:
        joined: by name of the whole, its parts in the order of the rows (``Family.joined``).
    """

    def __init__(self, joined: Mapping[str, Mapping[str, int]]) -> None:
        self._parts = {whole: tuple(parts) for whole, parts in joined.items()}
        self._whole = {part: whole for whole, parts in joined.items() for part in parts}

    def module(self, name: str) -> str:
        """The name of the linear layer that holds ``name``, which may be itself."""
        ending = "." if name.endswith(".") else ""
        parent, dot, own = name.removesuffix(".").rpartition(".")
        return f"{parent}{dot}{self._whole.get(own, own)}{ending}"

    def tensors(self, group: Tensors) -> Tensors:
        """One layer's tensors; scales of keys and values keep their names.

        Raises:
            ValueError: if parts have different scales of the whole tensor.
        """
        found: Tensors = {}
        for name, tensor in group.items():
            module, _, kind = name.rpartition(".")
            whole = self.module(module)
            if whole == module or kind in ("k_scale", "v_scale"):
                found[name] = tensor
            elif f"{whole}.{kind}" not in found:
                found[f"{whole}.{kind}"] = self._join(group, module, kind)
        return found

    def _join(self, group: Tensors, module: str, kind: str) -> torch.Tensor:
        parent, _, own = module.rpartition(".")
        parts = [group[f"{parent}.{part}.{kind}"] for part in self._parts[self._whole[own]]]
        if all(part.numel() == 1 for part in parts):
            if any(not torch.equal(part, parts[0]) for part in parts):
                raise ValueError(f"the parts of {self.module(module)} differ in {kind}")
            return parts[0]
        return torch.cat(parts)
