"""Read an exported folder as an engine would, with code that shares nothing with the exporter.

Only torch and safetensors (and transformers, for what the architecture's tensors must be) are used,
no ModelOpt and no megatron-core. Each number format is decoded in a file of ``decoders/``.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from post_training.common import files, safetensors_index
from post_training.export.decoders.registry import DECODERS, SCALES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

QUANT_CONFIG = "hf_quant_config.json"
_PIECE = 1 << 24  # elements compared at a time
# Safetensors' names of the dtypes that a weight that is not quantized may have.
_PLAIN = ("BF16", "F16", "F32")
_KV_SCALES = ("k_proj.k_scale", "v_proj.v_scale")


class Folder:
    """An exported model folder.

    Args:
        path: folder with ``config.json`` and safetensors; ``hf_quant_config.json`` if quantized.
        device: where tensors are decoded; a GPU decodes a large model much faster.
    """

    def __init__(self, path: Path, device: torch.device | str = "cpu") -> None:
        self.path = path
        self.device = torch.device(device)
        self.config = files.read_json_object(path / "config.json")
        self.index = safetensors_index.read(path)
        self.quantization: dict[str, Any] = {}
        if (path / QUANT_CONFIG).is_file():
            self.quantization = files.read_json_object(path / QUANT_CONFIG)["quantization"]

    def tensor(self, name: str) -> torch.Tensor:
        """One stored tensor, as it is."""
        with safe_open(self.index[name].path, framework="pt") as shard:
            return shard.get_tensor(name).to(self.device)

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
        module, _, kind = name.rpartition(".")
        stored = self.tensor(name)
        algorithm = self.algorithm(module) if kind == "weight" else None
        if algorithm is None:
            if not stored.dtype.is_floating_point or stored.element_size() < 2:
                raise ValueError(
                    f"{name} is stored as {stored.dtype}, but not said to be quantized"
                )
            return stored.float()
        if algorithm not in DECODERS:
            raise ValueError(f"{name}: no decoder for quant_algo {algorithm}")
        return DECODERS[algorithm].decode(self.tensor, module, stored)

    def problems(self) -> list[str]:
        """Everything about names, shapes, dtypes, scales and configuration that is not right."""
        found: list[str] = []
        expected = dict(self._expected_tensors())
        for name, shape in expected.items():
            if name not in self.index:
                found.append(f"{name} is missing")
                continue
            found += self._form_problems(name, shape)
        modules = {name.removesuffix(".weight") for name in expected if name.endswith(".weight")}
        for name in self.index:
            if name not in expected:
                found += self._scale_problems(name, modules)
        found += self._configuration_problems(modules)
        found += self._kv_problems()
        return found

    def weight_names(self) -> set[str]:
        """Every parameter that the architecture has."""
        return {name for name, _ in self._expected_tensors()}

    def bits_per_weight(self) -> float:
        """Stored bits of all tensors, scales included, per parameter of the architecture."""
        parameters = 0
        for _, shape in self._expected_tensors():
            parameters += int(torch.Size(shape).numel())
        return 8 * sum(entry.bytes for entry in self.index.values()) / parameters

    def load(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """A transformers model with the dequantized weights, in evaluation mode, on the CPU."""
        model = self._untrained(dtype=dtype)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(self.dequantized(name))
        return model.eval()

    @cached_property
    def _excluded(self) -> list[str]:
        return list(self.quantization.get("exclude_modules") or [])

    def _is_excluded(self, module: str) -> bool:
        return any(fnmatch.fnmatchcase(module, pattern) for pattern in self._excluded)

    def _expected_tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of each parameter that transformers' own model of this config has."""
        with torch.device("meta"):
            model = self._untrained()
        for name, parameter in model.named_parameters():
            yield name, tuple(parameter.shape)

    def _untrained(self, **options: Any) -> PreTrainedModel:
        """A transformers model of this architecture with weights that are not quantized."""
        # Late, because the command line of post_training.answer is checked without it.
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(self.path)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        return AutoModelForCausalLM.from_config(config, **options)

    def _form_problems(self, name: str, shape: tuple[int, ...]) -> Iterable[str]:
        """Stored dtype and shape against the configuration's, from the file's header alone."""
        entry = self.index[name]
        module, _, kind = name.rpartition(".")
        algorithm = self.algorithm(module) if kind == "weight" else None
        decoder = DECODERS.get(algorithm) if algorithm else None
        per_element = decoder.per_element if decoder else 1
        if algorithm and not decoder:
            yield f"{name}: no decoder for quant_algo {algorithm}"
        elif entry.dtype not in ((decoder.dtype,) if decoder else _PLAIN):
            said = f"{algorithm} needs {decoder.dtype}" if decoder else "not said to be quantized"
            yield f"{name} is stored as {entry.dtype}, but {said}"
        elif (*entry.shape[:-1], entry.shape[-1] * per_element) != shape:
            yield f"{name} has shape {entry.shape}, the architecture needs {shape}"

    def _scale_problems(self, name: str, modules: set[str]) -> Iterable[str]:
        module, _, kind = name.rpartition(".")
        if kind in SCALES:
            if module not in modules:
                yield f"{name} belongs to no linear layer"
            elif self.algorithm(module) is None:
                yield f"{name} is stored for a layer that the configuration calls unquantized"
            elif not _finite_and_positive(self.tensor(name), zero_allowed=kind == "weight_scale"):
                yield f"{name} is not finite and positive"
        elif name.endswith(_KV_SCALES):
            if not _finite_and_positive(self.tensor(name)):
                yield f"{name} is not finite and positive"
        else:
            yield f"{name} is no tensor of this architecture"

    def _configuration_problems(self, modules: set[str]) -> Iterable[str]:
        declared = self.config.get("quantization_config")
        has_scales = any(name.endswith(".weight_scale") for name in self.index)
        if not self.quantization:
            if has_scales or declared:
                yield f"{QUANT_CONFIG} is missing, so an engine would read packed weights as plain"
            return
        if not declared:
            yield "config.json has no quantization_config"
        elif declared.get("quant_algo") != self.quantization.get("quant_algo"):
            yield (
                f"config.json says {declared.get('quant_algo')}, "
                f"{QUANT_CONFIG} {self.quantization.get('quant_algo')}"
            )
        for module in sorted(modules):
            # Embeddings are never quantized; a linear that is neither quantized nor excluded
            # would be read as quantized.
            quantized = f"{module}.weight_scale" in self.index
            is_linear = module.endswith(("_proj", "lm_head")) or ".experts." in module
            listed = self.quantization.get("quantized_layers")
            covered = module not in listed if listed is not None else self._is_excluded(module)
            algorithm = self.quantization.get("quant_algo")
            if is_linear and algorithm and not quantized and not covered:
                yield f"{module} is plain, but the configuration does not exclude it"

    def _kv_problems(self) -> Iterable[str]:
        found = [name for name in self.index if name.endswith(_KV_SCALES)]
        wanted = 2 * self.config["num_hidden_layers"] if self._has_kv_scales else 0
        if len(found) != wanted:
            yield (
                f"{len(found)} key and value scales for {self.config['num_hidden_layers']} layers "
                f"with kv_cache_quant_algo {self.quantization.get('kv_cache_quant_algo')}"
            )

    @property
    def _has_kv_scales(self) -> bool:
        return bool(self.quantization.get("kv_cache_quant_algo"))


def compare(
    folder: Folder, reference: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype
) -> list[str]:
    """Compare stored weights with the weights of the model they came from.

    Args:
        reference: name and value in float32: fake-quantized weights, and scales.
        dtype: in which the model computed its fake quantization. The folder's product
            ``code * scale`` is rounded once, to float32; the model multiplies and divides by the
            scale's parts and rounds to ``dtype``. Equality is required to one unit in the last
            place of ``dtype`` and two of float32.

    Returns:
        One line per tensor that differs by more.
    """
    tolerance = torch.finfo(dtype).eps + 2 * torch.finfo(torch.float32).eps
    found = []
    for name, wanted in reference:
        try:
            actual = folder.dequantized(name)
        except (KeyError, ValueError) as error:
            found.append(f"{name}: {error}")
            continue
        wanted = wanted.to(actual.device)
        if wanted.dim() == 0 and actual.numel() == 1:
            actual = actual.reshape(())
        if actual.shape != wanted.shape:
            found.append(f"{name}: shape {tuple(actual.shape)} instead of {tuple(wanted.shape)}")
            continue
        if not _equal(actual, wanted, tolerance):
            worst = (actual - wanted).abs().max().item()
            found.append(f"{name} differs from the model's weight by up to {worst:.3g}")
    return found


def _equal(actual: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> bool:
    """Whether every element is within ``tolerance``, relative; NaN never is.

    Piece by piece: a whole embedding's temporaries would be the peak of an export's memory.
    """
    pieces = zip(actual.flatten().split(_PIECE), wanted.flatten().split(_PIECE), strict=True)
    return all(
        # NaN compares false with everything: ask for what must hold.
        bool(((a - w).abs() - tolerance * w.abs() <= torch.finfo(torch.float32).tiny).all())
        for a, w in pieces
    )


def _finite_and_positive(tensor: torch.Tensor, zero_allowed: bool = False) -> bool:
    values = tensor.float()
    low = values.min().item()
    return bool(values.isfinite().all()) and (low >= 0 if zero_allowed else low > 0)
