"""What a model takes before anything of it is quantized, and at least afterwards. No torch.

Bounds say what need not be tried; what is compared and reported is measured (``stored_size``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from post_training.common.errors import UsageError
from post_training.models import parameter_count
from post_training.models.architecture import Architecture
from post_training.quantization import kernels, layer_names
from post_training.quantization.formats import registry as formats

# Of the linears that formats with these layers quantize; others may quantize any.
_PARTS = {
    "MLP": (".mlp.",),
    "MLP and attention output": (".mlp.", ".linear_proj"),
    "experts": (".local_experts.",),
}


@dataclass(frozen=True)
class Sizes:
    """Of a model that is described.

    Attributes:
        parameters: of the whole model; None where they cannot be counted.
        weights: of linears that may be quantized, by the layers that a format is for.
        cached: elements of keys and values that a token adds.
        plain_bits: of a parameter.
    """

    parameters: int | None
    weights: Mapping[str, int]
    cached: int
    plain_bits: int

    @classmethod
    def of(cls, architecture: Architecture, precision: str, left_out: Sequence[str]) -> Sizes:
        values = architecture.resolved()
        try:
            parameters = parameter_count.total(architecture)
        except UsageError:
            parameters = None
        linears = list(_linears(values, left_out))
        weights = {
            kind: sum(count for name, count in linears if any(each in name for each in parts))
            for kind, parts in {**_PARTS, "all": (".",)}.items()
        }
        return cls(parameters, weights, _cached(values), 32 if precision == "fp32" else 16)

    @property
    def plain(self) -> float | None:
        """Bytes of the model as it is."""
        return None if self.parameters is None else self.parameters * self.plain_bits / 8

    def least(self, bits: float, layers: str = "all") -> float | None:
        """Bytes that remain at least where the linears have so many bits a weight."""
        if self.plain is None:
            return None
        return self.plain - self._of(layers) * (self.plain_bits - bits) / 8

    def bits_within(self, size: float) -> float | None:
        """Bits a weight of the linears for which the model takes ``size`` bytes."""
        weights = self._of("all")
        if self.plain is None or not weights:
            return None
        return self.plain_bits - (self.plain - size) * 8 / weights

    def cache_bytes(self, tokens: int, kv_cache: str) -> float:
        """Bytes of the keys and values of these tokens."""
        return tokens * self.cached * (formats.KV_CACHES[kv_cache].bits or self.plain_bits) / 8

    def _of(self, layers: str) -> int:
        return self.weights.get(layers, self.weights["all"])


def _linears(values: Mapping[str, Any], left_out: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Name and weights of each linear that a format may quantize; a layer's experts together."""
    for layer in kernels.layers(values, separate=False):
        experts = values["num_moe_experts"] if layer.of_experts else 1
        for name in layer.names():
            if not layer_names.matching(name.replace("*", "0"), left_out):
                yield name, layer.outputs * layer.inputs * experts


def _cached(values: Mapping[str, Any]) -> int:
    """Elements of keys and values of a token; of latent attention, its latents and positions."""
    layers = values["num_layers"]
    letters = values["hybrid_layer_pattern"] or ""
    if len(letters) == layers:
        layers = letters.count("*")
    else:
        layers -= sum(parameter_count.delta_nets({**values}))
    if values["multi_latent_attention"]:
        return layers * (values["kv_lora_rank"] + values["qk_pos_emb_head_dim"])
    return layers * 2 * values["num_query_groups"] * values["kv_channels"]
