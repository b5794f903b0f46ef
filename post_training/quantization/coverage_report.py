"""What a recipe reached in a model, as the manifest and the summary show it. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from post_training.quantization import formats
from post_training.quantization.formats import Linear


@dataclass(frozen=True)
class Layer:
    """One linear layer of the model, over all ranks.

    Attributes:
        name: module name with the layer's number in the whole model.
        parameters: of the whole weight.
        form: how it is quantized; None if it is not.
        reason: why it is not quantized; empty otherwise.
    """

    name: str
    parameters: int
    form: Linear | None
    reason: str = ""


@dataclass(frozen=True)
class Coverage:
    """The state of a model after quantizers were inserted.

    Attributes:
        layers: every linear layer, by name.
        other_parameters: parameters that are not weights of linear layers.
        quantizers: kind (``weight``, ``input``, ``KV cache``, ...) -> number that are enabled.
        unused_patterns: patterns of the recipe that match nothing.
    """

    layers: tuple[Layer, ...]
    other_parameters: int
    quantizers: dict[str, int]
    unused_patterns: tuple[str, ...] = ()

    @property
    def quantized(self) -> list[Layer]:
        return [layer for layer in self.layers if layer.form is not None]

    def bits_per_weight(self, plain_bits: int = 16) -> tuple[float, float]:
        """Stored bits per parameter, scales included: of quantized layers, and of all.

        Args:
            plain_bits: of parameters that are not quantized.
        """
        weights = sum(layer.parameters for layer in self.quantized)
        bits = sum(_bits(layer, plain_bits) * layer.parameters for layer in self.quantized)
        plain = sum(layer.parameters for layer in self.layers if layer.form is None)
        plain += self.other_parameters
        total = (bits + plain_bits * plain) / max(1, weights + plain)
        return (bits / weights if weights else float(plain_bits)), total

    def describe_quantized(self) -> str:
        """``28 linear_fc1, 28 linear_fc2: fp8 with fp8 inputs``, one line a form."""
        lines = []
        for form in sorted({each.form for each in self.quantized if each.form}, key=str):
            names = Counter(_kind(each.name) for each in self.quantized if each.form == form)
            inputs = f"{form.input} inputs" if form.input else "16-bit inputs"
            lines.append(f"{_list(names)}: {form.weight} with {inputs}")
        return "\n".join(lines) or "none"

    def describe_left_out(self) -> str:
        """The plain linear layers by reason, one line each."""
        left = [layer for layer in self.layers if layer.form is None]
        lines = []
        for reason in dict.fromkeys(layer.reason for layer in left):
            names = Counter(_kind(layer.name) for layer in left if layer.reason == reason)
            lines.append(f"{_list(names)}: {reason}")
        if self.unused_patterns:
            count = len(self.unused_patterns)
            lines.append(f"{count} patterns match nothing here, e.g. {self.unused_patterns[0]}")
        return "\n".join(lines) or "none"

    def to_json(self) -> dict[str, Any]:
        """For the manifest."""
        of_quantized, of_all = self.bits_per_weight()
        return {
            "linear_layers": len(self.layers),
            "quantized_layers": len(self.quantized),
            "quantizers": self.quantizers,
            "left_out": {each.name: each.reason for each in self.layers if each.form is None},
            "unused_patterns": list(self.unused_patterns),
            "bits_per_quantized_weight": round(of_quantized, 3),
            "bits_per_weight": round(of_all, 3),
        }


def _bits(layer: Layer, plain_bits: int) -> float:
    number_format = formats.WEIGHTS.get(layer.form.weight) if layer.form else None
    return number_format.bits if number_format else plain_bits


def _kind(name: str) -> str:
    """The layer's own name, and its parent's where that tells more: ``experts`` for an expert."""
    parts = [part for part in name.split(".") if not part.isdecimal()]
    return "experts' " + parts[-1] if "local_experts" in parts else parts[-1]


def _list(names: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" if count > 1 else name for name, count in names.items())
