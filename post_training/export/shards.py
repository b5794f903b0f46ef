"""Tensors -> safetensors files of a limited size, and the index that names them."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from post_training.common import files, safetensors_index
from post_training.common.errors import UsageError
from post_training.distributed.collectives import from_all_ranks, on_first_rank

Tensors = dict[str, torch.Tensor]


class ShardWriter:
    """Collects tensors and writes a file before it would exceed ``max_bytes``."""

    def __init__(self, folder: Path, prefix: str, max_bytes: int) -> None:
        self._folder = folder
        self._prefix = prefix
        self._max_bytes = max_bytes
        self._pending: Tensors = {}
        self._pending_bytes = 0
        self._files: list[str] = []

    def add(self, tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            size = tensor.numel() * tensor.element_size()
            if self._pending and self._pending_bytes + size > self._max_bytes:
                self._flush()
            # safetensors refuses views that share memory; scales are shared between q, k and v.
            self._pending[name] = tensor.detach().cpu().contiguous().clone()
            self._pending_bytes += size

    def finish(self) -> list[str]:
        """Write what is left. Returns the file names in order."""
        if self._pending:
            self._flush()
        return self._files

    def _flush(self) -> None:
        name = f"{self._prefix}-{len(self._files):05d}.safetensors"
        save_file(self._pending, self._folder / name, metadata={"format": "pt"})
        self._files.append(name)
        self._pending, self._pending_bytes = {}, 0


def join_shards(folder: Path, mine: list[str]) -> None:
    """Give all ranks' files their final names and write the index; a collective call.

    Raises:
        UsageError: if two ranks wrote a tensor of the same name.
    """
    names = [name for each in from_all_ranks(mine) for name in each]

    def join() -> None:
        weight_map: dict[str, str] = {}
        total = 0
        for number, name in enumerate(names, start=1):
            final = f"model-{number:05d}-of-{len(names):05d}.safetensors"
            if len(names) == 1:
                final = safetensors_index.SINGLE
            (folder / name).rename(folder / final)
            for tensor, entry in safetensors_index.read_file(folder / final).items():
                if tensor in weight_map:
                    raise UsageError(
                        f"export {folder}",
                        f"two ranks wrote {tensor}",
                        "export at TP=1 and DP=1, which export.sh chooses",
                    )
                weight_map[tensor] = final
                total += entry.bytes
        if len(names) > 1:
            index = {
                "metadata": {"total_size": total},
                "weight_map": dict(sorted(weight_map.items())),
            }
            files.write_json(folder / safetensors_index.INDEX, index)

    on_first_rank(join)
