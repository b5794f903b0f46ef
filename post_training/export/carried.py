"""Tensors of an exported folder that no layer of the model has: MTP layers, vision towers.

They come from the files beside the checkpoint's ``config.json`` (``checkpoints/extra_tensors.py``)
and are written by the first rank, unquantized.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from post_training.checkpoints import extra_tensors
from post_training.distributed.session import Session
from post_training.export.folder import Tensors
from post_training.export.readback import Folder


@dataclass(frozen=True)
class Carried:
    """The tensors of ``source`` by ``names``; none on ranks other than the first."""

    source: Path
    names: frozenset[str]

    @classmethod
    def of(cls, source: Path, session: Session) -> Carried:
        return cls(source, frozenset(extra_tensors.find(source) if session.is_main else ()))

    def groups(self) -> Iterator[Tensors]:
        """Each tensor, to be written."""
        if self.names:
            yield from ({name: tensor} for name, tensor in extra_tensors.read(self.source))

    def excluded(self) -> list[str]:
        """Patterns for ``exclude_modules``: the layers that they are of, and other modules."""
        modules = (name.split(".")[:-1] for name in self.names)
        return sorted({".".join(parts[:3] + ["*"] * (len(parts) > 3)) for parts in modules})

    def problems(self, written: Folder) -> list[str]:
        """What differs in a folder from the source, bit for bit."""
        if not self.names:
            return []
        return [
            f"{name} is not what the source has"
            for name, tensor in extra_tensors.read(self.source)
            if name not in written.index or not torch.equal(written.tensor(name).cpu(), tensor)
        ]
