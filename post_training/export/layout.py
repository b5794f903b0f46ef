"""What a layout of ours consists of: weights that are written from their fake-quantized values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import modelopt
import torch
from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format

from post_training.common.errors import UsageError
from post_training.common.safetensors_index import Entry
from post_training.export.fake_quantized import as_computed, step_of_each
from post_training.export.folder import Tensors
from post_training.export.streaming_exporter import StreamingExporter


class Configuration(NamedTuple):
    """``quantization_config`` of ``config.json``, and ``hf_quant_config.json``, if there is one."""

    declared: dict[str, Any]
    beside: dict[str, Any] | None = None


class Layout(ABC):
    """How the linears of a model are stored; a subclass a layout, an instance a ``quant_algo``."""

    def of(self, exporter: StreamingExporter) -> Layout:
        """The layout for one export: itself, unless it depends on the model."""
        return self

    def complete(self) -> Layout:
        """Itself after the last tensor, for :meth:`configuration`; a collective call."""
        return self

    def groups(self, exporter: StreamingExporter, dtype: torch.dtype) -> Iterator[Tensors]:
        """The tensors to write, as :meth:`StreamingExporter.groups`.

        Args:
            dtype: of what is not quantized.

        Raises:
            UsageError: for scales that the layout cannot hold.
        """
        for values, steps in exporter.views(as_computed, step_of_each):
            found: Tensors = {}
            for name, value in values.items():
                module, _, kind = name.rpartition(".")
                if kind == "weight" and value.dim() == 2 and bool(steps[name].any()):
                    found.update(self.stored(module, value, steps[name], dtype))
                elif kind in ("input_scale", "weight_scale_2"):
                    found[name] = self.whole_scale(value.float())
                elif kind in ("k_scale", "v_scale"):
                    found.update(self.cache_scale(name, value.float()))
                elif kind == "e_score_correction_bias":
                    found[name] = value.float()  # as ModelOpt's path writes it
                else:
                    found[name] = value.to(dtype)
            yield found

    @abstractmethod
    def stored(
        self, module: str, value: torch.Tensor, steps: torch.Tensor, dtype: torch.dtype
    ) -> Tensors:
        """The tensors of a linear.

        Args:
            value: the fake-quantized weight, float32 [out, in].
            steps: what each element's code is multiplied by, of the same shape.
            dtype: of what is not quantized.
        """

    def whole_scale(self, value: torch.Tensor) -> torch.Tensor:
        """How one scale of all inputs, or of a whole weight, is stored; float32."""
        return value.reshape(1)

    def cache_scale(self, name: str, value: torch.Tensor) -> Tensors:
        """The tensor of a scale of keys or values, ``*.k_proj.k_scale``, float32: as ModelOpt's."""
        return {name: value}

    @abstractmethod
    def configuration(self, index: Mapping[str, Entry], kv_cache: str) -> Configuration:
        """What says so, for the tensors that were written.

        Args:
            kv_cache: ``kv_cache_quant_algo``; empty for none.
        """


def plain_linears(index: Mapping[str, Entry]) -> list[str]:
    """The linears that are not quantized, by name.

    An output layer that is tied to the embedding has no tensor, and is still one.
    """
    quantized = {name.removesuffix(".weight_scale") for name in index}
    plain = {
        name.removesuffix(".weight")
        for name, entry in index.items()
        if name.endswith(".weight") and len(entry.shape) == 2 and "embed" not in name
    }
    return sorted({"lm_head", *plain} - quantized)


def exactly(module: str, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The scales of a linear in the model's dtype, in which engines read them.

    Raises:
        UsageError: if that would change them.
    """
    if not torch.equal(scale.to(dtype).float(), scale):
        raise UsageError(
            f"the scales of {module}",
            f"{dtype} does not hold them, and engines read scales in the model's dtype",
            "quantize the model again with this version",
        )
    return scale.to(dtype)


def modelopts_configuration(
    algorithm: str, index: Mapping[str, Entry], kv_cache: str, **more: Any
) -> Configuration:
    """What says so in ModelOpt's way: :meth:`Layout.configuration` for one ``quant_algo``."""
    quantization: dict[str, Any] = {
        "quant_algo": algorithm,
        **more,
        "kv_cache_quant_algo": kv_cache or None,
        "exclude_modules": plain_linears(index),
    }
    beside = {
        "producer": {"name": "modelopt", "version": modelopt.__version__},
        "quantization": quantization,
    }
    return Configuration(convert_hf_quant_config_format(beside), beside)
