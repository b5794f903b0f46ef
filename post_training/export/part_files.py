"""An exported folder written part by part: each part's tensors in files of their own, compared."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from post_training.common import hashing, safetensors_index
from post_training.export import comparison, readback
from post_training.export.content import Content
from post_training.export.folder import Tensors, require_equal, shards
from post_training.export.model_folder import Writer
from post_training.models.parts import Part


@dataclass
class Written:
    """What is known of a part that was written; JSON.

    Attributes:
        files: names in the working folder.
        compared: names of weights and scales -> ``quant_algo`` with which they were decoded.
        layers: ModelOpt's description of each quantized linear.
        excluded: the linears that are not.
        kv_cache: how ModelOpt calls the format of keys and values; None for none.
    """

    files: list[str] = field(default_factory=list)
    compared: dict[str, str | None] = field(default_factory=dict)
    layers: dict[str, Any] = field(default_factory=dict)
    excluded: list[str] = field(default_factory=list)
    kv_cache: str | None = None


class PartFiles:
    """Writes parts into the working folder of an export. Collective calls.

    Args:
        writer: of the whole model.
        work: the working folder.
        device: where what was written is decoded.
        max_bytes: of a file.
    """

    def __init__(self, writer: Writer, work: Path, device: torch.device, max_bytes: int) -> None:
        self._writer, self._work = writer, work
        self._device, self._max_bytes = device, max_bytes

    def write(self, number: int, part: Part) -> Written:
        """Write the part, and compare what was written with it.

        Raises:
            UsageError: if that differs.
        """
        exporter, found = self._writer.exporter, Written()
        exporter.model = part.model
        self._describe(Written())
        found.files = self._save(number, self._writer.groups())
        # Views are described too, as not quantized.
        found.layers = dict(exporter.layer_config_dict)
        found.excluded = list(exporter.exclude_modules)
        found.kv_cache = exporter.kv_cache_dtype
        self._compare(found)
        return found

    def write_carried(self, number: int) -> Written:
        """Write the tensors that no layer of the model has."""
        return Written(self._save(number, self._writer.carried.groups()))

    def _save(self, number: int, groups: Iterable[Tensors]) -> list[str]:
        """The names of the files."""
        names: list[str] = []
        for shard in shards(groups, self._max_bytes):
            names.append(f"part-{number:05d}-{len(names):05d}.safetensors")
            save_file(shard, self._work / names[-1], metadata={"format": "pt"})
            hashing.describe_ahead(self._work / names[-1])
        return names

    def _compare(self, found: Written) -> None:
        paths = [self._work / name for name in found.files]
        index = {
            name: entry
            for path in paths
            for name, entry in safetensors_index.read_file(path).items()
        }
        said = self._writer.configuration(lambda: index)
        content = Content(
            self._writer.config(said), said.beside if said is not None else None, index
        )
        written = readback.Folder(self._work, self._device, content=content)
        problems: list[str] = []
        for group in self._writer.views():
            problems += comparison.compare(written, group.items(), self._writer.dtype)
            found.compared |= {name: _algorithm(written, name) for name in group}
        require_equal(problems, self._work)

    def describe_all(self, parts: list[Written]) -> None:
        """Let the writer know of all parts, some of which another process may have written."""
        whole = Written(kv_cache=next((each.kv_cache for each in parts if each.kv_cache), None))
        for each in parts:
            whole.layers.update(each.layers)
            whole.excluded += each.excluded
        self._describe(whole)

    def _describe(self, known: Written) -> None:
        exporter = self._writer.exporter
        exporter.layer_config_dict = dict(known.layers)
        exporter.exclude_modules = list(known.excluded)
        exporter.kv_cache_dtype = known.kv_cache


def differently_read(folder: readback.Folder, parts: list[Written]) -> list[str]:
    """Weights that the whole folder's configuration describes otherwise than their part's did."""
    return [
        f"{name} was compared as {algorithm}, and is {_algorithm(folder, name)}"
        for part in parts
        for name, algorithm in part.compared.items()
        if _algorithm(folder, name) != algorithm
    ]


def _algorithm(folder: readback.Folder, name: str) -> str | None:
    module, _, kind = name.rpartition(".")
    return folder.algorithm(module) if kind == "weight" else None
