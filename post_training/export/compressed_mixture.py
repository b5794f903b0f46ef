"""Linears of several formats in the layout of the compressed-tensors package.

Each has the tensors of its own format; ``config.json`` has a group for each format, which names
its linears.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from post_training.common.safetensors_index import Entry
from post_training.distributed.collectives import from_all_ranks
from post_training.export.compressed_tensors import LAYOUTS, cache_scale, declared
from post_training.export.folder import Tensors
from post_training.export.layout import Configuration, Layout
from post_training.quantization.formats import exportable

if TYPE_CHECKING:
    from post_training.export.streaming_exporter import StreamingExporter
    from post_training.quantization.formats.base import Linear

_FORMAT = "mixed-precision"


class Mixture(Layout):
    """A layout for each linear.

    Args:
        linears: how each is quantized, by name; filled while tensors are written.
    """

    def __init__(self, linears: Mapping[str, Linear] | None = None) -> None:
        self._linears: Mapping[str, Linear] = linears if linears is not None else {}
        self._algorithms: dict[str, str] = {}

    def of(self, exporter: StreamingExporter) -> Mixture:
        return Mixture(exporter.linears)

    def stored(
        self, module: str, value: torch.Tensor, steps: torch.Tensor, dtype: torch.dtype
    ) -> Tensors:
        algorithm = exportable.judge([self._linears[module]]).quant_algo
        self._algorithms[module] = algorithm
        return LAYOUTS[algorithm].stored(module, value, steps, dtype)

    def cache_scale(self, name: str, value: torch.Tensor) -> Tensors:
        return cache_scale(name, value)

    def complete(self) -> Mixture:
        """Knows the linears that other ranks wrote."""
        for each in from_all_ranks(self._algorithms):
            self._algorithms.update(each)
        return self

    def configuration(self, index: Mapping[str, Entry], kv_cache: str) -> Configuration:
        found = self._algorithms
        groups = [
            LAYOUTS[algorithm].described(sorted(name for name in found if found[name] == algorithm))
            for algorithm in sorted(set(found.values()))
        ]
        return declared(_FORMAT, groups, index, kv_cache)
