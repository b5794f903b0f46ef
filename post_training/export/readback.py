"""Read an exported folder as an engine would, with code that shares nothing with the exporter.

No ModelOpt and no megatron-core is used. Each number format is decoded in a file of ``decoders/``.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from post_training.export import fused_linears, stacked_experts, staging
from post_training.export.content import Content
from post_training.export.decoders import compressed_tensors, configuration
from post_training.export.decoders.base import Decoder
from post_training.export.decoders.registry import DECODERS, SCALES
from post_training.models.families import registry as families

if TYPE_CHECKING:
    from transformers import PreTrainedModel

QUANT_CONFIG = configuration.FILE
# Safetensors' names of the dtypes that a weight that is not quantized may have.
_PLAIN = ("BF16", "F16", "F32")
_KV_SCALES = ("k_proj.k_scale", "v_proj.v_scale")
_COMPRESSED_KV_SCALES = (".k_scale", ".v_scale")  # of the attention itself


class Folder:
    """An exported model folder.

    Args:
        path: folder with ``config.json`` and safetensors; ``hf_quant_config.json`` if quantized.
        device: where tensors are decoded; a GPU decodes a large model much faster.
        carried: names of tensors that no layer of the Megatron model has.
        content: of a folder that is not complete yet; its tensors are then those alone.
    """

    def __init__(
        self,
        path: Path,
        device: torch.device | str = "cpu",
        carried: Iterable[str] = (),
        content: Content | None = None,
    ) -> None:
        self.path, self.carried = path, frozenset(carried)
        self.device = torch.device(device)
        content = content or Content.of(path)
        self.config, self.index = content.config, content.tensors
        self.quantization: dict[str, Any] = {}
        declared = self.config.get("quantization_config") or {}
        self.is_compressed = declared.get("quant_method") == compressed_tensors.METHOD
        if self.is_compressed:
            self.quantization = compressed_tensors.described(declared)
        elif content.beside:
            self.quantization = content.beside["quantization"]

    @cached_property
    def expected(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of each tensor that transformers' own model of this config is saved as.

        Its parameters and the biases of routers; experts, which it joins while loading, one by one.
        """
        from transformers.core_model_loading import revert_weight_conversion

        with torch.device("meta"):
            model = self.untrained()
            kept = model.state_dict().keys()
            tensors = {name: each for name, each in model.named_buffers() if name in kept}
            saved = revert_weight_conversion(model, {**dict(model.named_parameters()), **tensors})
        family = families.of(self.config)
        published = {each: name for name, each in family.other_names.items()}
        shapes = {published.get(name, name): tuple(each.shape) for name, each in saved.items()}
        return stacked_experts.named(shapes, self.index, family.stacked)

    def tensor(self, name: str) -> torch.Tensor:
        """One stored tensor, as it is."""
        with safe_open(self.index[name].path, framework="pt") as shard:
            return staging.to_device(shard.get_tensor(name), self.device)

    def algorithm(self, module: str) -> str | None:
        """``quant_algo`` of a linear such as ``model.layers.0.mlp.up_proj``; None: plain."""
        if self._is_excluded(module) or f"{module}.weight_scale" not in self.index:
            return None
        layers = self.quantization.get("quantized_layers")
        if layers is not None:
            return layers[module]["quant_algo"] if module in layers else None
        return self.quantization.get("quant_algo")

    def dequantized(self, name: str) -> torch.Tensor:
        """A weight in float32, shape [out, in] for linears, as an engine computes with it.

        Raises:
            ValueError: if its stored form is not what the configuration says.
        """
        decoder = self._decoder(name)
        if decoder is not None:
            return decoder.weight(self.tensor, name.removesuffix(".weight"))
        return self._plain(name).float()

    def value(self, name: str) -> torch.Tensor:
        """The same, but what is not quantized in the dtype in which it is stored."""
        return self.dequantized(name) if self._decoder(name) else self._plain(name)

    def _plain(self, name: str) -> torch.Tensor:
        if self.is_compressed and name.endswith(_KV_SCALES):
            name = compressed_tensors.cache_scale(name)
        stored = self.tensor(name)
        if not stored.dtype.is_floating_point or stored.element_size() < 2:
            raise ValueError(f"{name} is stored as {stored.dtype}, but not said to be quantized")
        return stored

    def problems(self) -> list[str]:
        """Everything about names, shapes, dtypes, scales and configuration that is not right."""
        found: list[str] = []
        used: set[str] = set()
        for name, shape in self.expected.items():
            stored = self.stored_name(name)
            used.add(stored)
            if stored in self.index:
                found += self._form_problems(name, shape)
            else:
                found.append(f"{stored} is missing")
        modules = {n.removesuffix(".weight") for n in self.expected if n.endswith(".weight")}
        for name in self.index.keys() - used - self.carried:
            found += self._scale_problems(name, modules)
        found += fused_linears.problems(self.expected, self.algorithm, self._number)
        return [*found, *self._configuration_problems(modules)]

    def damaged_values(self) -> list[str]:
        """Tensors with values that are not finite; decodes all of them."""
        return [
            f"{name} has values that are not finite"
            for name in self.expected
            if not self.dequantized(name).isfinite().all()
        ]

    def bits_per_weight(self) -> float:
        """Stored bits of all tensors, scales included, per parameter of the architecture."""
        names = self.index.keys() - self.carried
        parameters = sum(math.prod(self.expected[n]) for n in self.expected.keys() - self.carried)
        return 8 * sum(self.index[name].bytes for name in names) / parameters

    def untrained(self, **options: Any) -> PreTrainedModel:
        """A transformers model of this architecture with weights that are not quantized."""
        from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

        auto = AutoModelForImageTextToText if "text_config" in self.config else AutoModelForCausalLM
        return auto.from_config(self.plain_config(), **options)

    def plain_config(self) -> Any:
        """transformers' configuration of the model with weights that are not quantized."""
        from post_training.models import transformers_names

        config = transformers_names.config(self.path)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        return config

    def _is_excluded(self, module: str) -> bool:
        patterns = self.quantization.get("exclude_modules") or []
        return any(fnmatch.fnmatchcase(module, pattern) for pattern in patterns)

    def _decoder(self, name: str) -> Decoder | None:
        """How a weight is stored by the configuration; None: plain."""
        module, _, kind = name.rpartition(".")
        algorithm = self.algorithm(module) if kind == "weight" else None
        if algorithm and algorithm not in DECODERS:
            raise ValueError(f"{name}: no decoder for quant_algo {algorithm}")
        return DECODERS[algorithm] if algorithm else None

    def stored_name(self, name: str) -> str:
        """The tensor that holds a parameter."""
        try:
            decoder = self._decoder(name)
        except ValueError:
            return name
        return f"{name.removesuffix('weight')}{decoder.stored}" if decoder else name

    def is_cache_scale(self, name: str) -> bool:
        """Whether it is a scale of keys or values, of an attention of the architecture."""
        if not self.is_compressed:
            return name.endswith(_KV_SCALES)
        attention = name.rpartition(".")[0]
        return (
            name.endswith(_COMPRESSED_KV_SCALES) and f"{attention}.o_proj.weight" in self.expected
        )

    def is_sound_scale(self, name: str) -> bool:
        """Whether each number of a scale is finite and positive, or what a block of zeros has."""
        module, _, kind = name.rpartition(".")
        if kind == "weight_shape":  # its decoder compares it
            return True
        decoder, values = DECODERS.get(self.algorithm(module) or ""), self.tensor(name).float()
        zeros = decoder is not None and decoder.zero_scales and kind == "weight_scale"
        return bool((values.isfinite() & ((values >= 0) if zeros else (values > 0))).all())

    def _form_problems(self, name: str, shape: tuple[int, ...]) -> Iterable[str]:
        """Stored dtype and shape against the configuration's, from the file's header alone."""
        entry = self.index[self.stored_name(name)]
        try:
            decoder = self._decoder(name)
        except ValueError as error:
            yield str(error)
            return
        if decoder and entry.dtype != decoder.dtype:
            needed = f"{decoder.algorithm} needs {decoder.dtype}"
            yield f"{name} is stored as {entry.dtype}, but {needed}"
        elif not decoder and entry.dtype not in _PLAIN:
            yield f"{name} is stored as {entry.dtype}, but not said to be quantized"
        elif _shape(entry.shape, decoder) != shape:
            yield f"{name} has shape {entry.shape}, the architecture needs {shape}"
        if decoder:
            module = name.removesuffix(".weight")
            missing = [each for each in decoder.scales if f"{module}.{each}" not in self.index]
            yield from (f"{module}.{each} is missing" for each in missing)
            if self._group_size(module) not in (None, decoder.block):
                size = self._group_size(module)
                yield f"{module} has blocks of {decoder.block}, not of {size} as group_size says"

    def _scale_problems(self, name: str, modules: set[str]) -> Iterable[str]:
        """Of a tensor that is no parameter."""
        module, _, kind = name.rpartition(".")
        decoder = DECODERS.get(self.algorithm(module) or "")
        if kind not in SCALES and not self.is_cache_scale(name):
            yield f"{name} is no tensor of this architecture"
        elif kind in SCALES and module not in modules:
            yield f"{name} belongs to no linear layer"
        elif kind in SCALES and self.algorithm(module) is None:
            yield f"{name} is stored for a layer that the configuration calls unquantized"
        elif decoder and kind in SCALES and kind not in decoder.scales:
            yield f"{name} is no tensor of {decoder.algorithm}"
        elif not self.is_sound_scale(name):
            yield f"{name} is not finite and positive"

    def _number(self, name: str) -> float | None:
        """What a stored number holds; None for the scales of rows or blocks, be it of one."""
        entry = self.index.get(name)
        return float(self.tensor(name)) if entry and entry.shape in ((), (1,)) else None

    def _group_size(self, module: str) -> int | None:
        """Inputs that share a scale, where ModelOpt's configuration says it."""
        layers = self.quantization.get("quantized_layers")
        said = self.quantization if layers is None else layers.get(module, {})
        return said.get("group_size")

    def _configuration_problems(self, modules: set[str]) -> Iterable[str]:
        if {"dtype", "torch_dtype"} <= self.config.keys():
            yield "config.json has dtype and torch_dtype, of which engines read one or the other"
        kv_scales = sum(map(self.is_cache_scale, self.index))
        layers = sum(n.endswith(".o_proj.weight") for n in self.expected.keys() - self.carried)
        kv_algorithm = self.quantization.get("kv_cache_quant_algo")
        if kv_scales != (2 * layers if kv_algorithm else 0):
            yield (
                f"{kv_scales} key and value scales for {layers} layers "
                f"with kv_cache_quant_algo {kv_algorithm}"
            )
        declared = self.config.get("quantization_config")
        if not self.quantization:
            if declared or any(name.endswith(".weight_scale") for name in self.index):
                yield f"{QUANT_CONFIG} is missing, so an engine would read packed weights as plain"
            return
        algorithm = self.quantization.get("quant_algo")
        if not declared:
            yield "config.json has no quantization_config"
        elif self.is_compressed:
            if (self.path / QUANT_CONFIG).exists():
                yield f"{QUANT_CONFIG} stands beside a configuration of {compressed_tensors.METHOD}"
        elif declared.get("quant_algo") != algorithm:
            yield f"config.json says {declared.get('quant_algo')}, {QUANT_CONFIG} {algorithm}"
        if not algorithm:
            return
        listed = self.quantization.get("quantized_layers")
        for module in sorted(modules):
            # Embeddings are never quantized; a linear that is neither quantized nor excluded
            # would be read as quantized.
            ends = ("_proj", "_with_mqa", "lm_head")
            is_linear = module.endswith(ends) or ".experts." in module or ".in_proj_" in module
            covered = module not in listed if listed is not None else self._is_excluded(module)
            if is_linear and not covered and f"{module}.weight_scale" not in self.index:
                yield f"{module} is plain, but the configuration does not exclude it"


def _shape(stored: tuple[int, ...], decoder: Decoder | None) -> tuple[int, ...]:
    """Of the weight that a tensor holds."""
    if decoder is None or len(stored) < 2:
        return stored
    rows, columns = stored[-2] * decoder.rows_per_element, stored[-1] * decoder.per_element
    return (*stored[:-2], rows, columns)
