"""What ModelOpt is told: the ``quant_cfg`` and ``algorithm`` of a format or recipe."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

from modelopt.torch.quantization import config as modelopt_config
from modelopt.torch.quantization.algorithms import estimate_quant_compression
from modelopt.torch.quantization.config import QuantizeConfig

from post_training.quantization import layer_names, recipes
from post_training.quantization.formats import registry as formats
from post_training.quantization.formats.base import Format
from post_training.quantization.options import QuantizeOptions
from post_training.quantization.recipes import Recipe

Config = dict[str, Any]

QKV_PATTERNS = tuple(f"{pattern}.*" for pattern in layer_names.QKV)
ALL_OFF: Config = {"quantizer_name": "*", "enable": False}


def configuration(options: QuantizeOptions, choice: Format | Recipe) -> Config:
    """ModelOpt's configuration of a format, or of a recipe of type ``ptq``, flags applied.

    Unlike in Megatron-LM, where ``--disable-qkv-quant`` disables all of attention, the output
    projection and the KV cache stay quantized.
    """
    if isinstance(choice, Recipe):
        config = dumped(recipes.load(choice).quantize)
    else:
        config = named(choice.name)
    entries = [*_with_megatron_names(config["quant_cfg"])]
    off = ["*input_quantizer"] if options.weight_only else []
    off += QKV_PATTERNS if options.disable_qkv_quant else ()
    entries += [{"quantizer_name": pattern, "enable": False} for pattern in off]
    cache = cache_entries(options.export_kv_cache_quant)
    config["quant_cfg"] = entries + cache
    if cache and not config.get("algorithm"):
        # Keys and values need a maximum even where the weights' scales need no calibration.
        config["algorithm"] = "max"
    if options.experts.sync_expert_weight_amax:
        algorithm = config["algorithm"]
        given = algorithm if isinstance(algorithm, dict) else {"method": algorithm}
        config["algorithm"] = {**given, "sync_expert_weight_amax": True}
    return config


def named(name: str) -> Config:
    """A copy of the configuration of a format, complete in itself.

    ModelOpt's for keys and values are meant to be merged: alone, ModelOpt would quantize every
    weight with its default, INT8.
    """
    row = formats.FORMATS[name]
    if row.quant_cfg:
        own = [*row.quant_cfg, *modelopt_config._default_disabled_quantizer_cfg]
        return copy.deepcopy({"quant_cfg": [ALL_OFF, *own], "algorithm": row.method or None})
    config: Config = copy.deepcopy(getattr(modelopt_config, name))
    if row.linear is None:
        config["quant_cfg"] = [dict(ALL_OFF), *config["quant_cfg"]]
    config.setdefault("algorithm", "max")
    return _by_row(config)


def dumped(configuration: QuantizeConfig) -> Config:
    """The part of a recipe that says how to quantize."""
    return _by_row(configuration.model_dump(exclude_unset=True))


def cache_entries(kv_cache: str) -> list[Config]:
    """Entries for keys and values, to append to a configuration's; by --export-kv-cache-quant."""
    name = formats.KV_CACHES[kv_cache].config
    return named(name)["quant_cfg"][1:] if name else []


def _by_row(config: Config) -> Config:
    """The configuration with a maximum for each row of a block of rows and columns.

    Rows that share a scale in the export get one maximum afterwards (``row_blocks``).
    """

    def changed(entry: Config) -> Config:
        settings: Any = entry.get("cfg")
        blocks = settings.get("block_sizes") if isinstance(settings, dict) else None
        if not blocks or blocks.get(-2) is None or blocks.get("scale_bits"):
            return entry
        columns = {key: value for key, value in blocks.items() if key != -2}
        return {**entry, "cfg": {**settings, "block_sizes": columns}}

    return {**config, "quant_cfg": [changed(entry) for entry in config["quant_cfg"]]}


def _with_megatron_names(entries: list[Config]) -> Iterator[Config]:
    """Each entry, followed by the same for Megatron's name of the layer it means."""
    given = {entry["quantizer_name"] for entry in entries}
    for entry in entries:
        yield entry
        name = entry["quantizer_name"]
        for pattern, ours in layer_names.MEGATRON_NAMES:
            translated = pattern.sub(ours, name)
            if translated not in given:
                given.add(translated)
                yield {**copy.deepcopy(entry), "quantizer_name": translated}


def for_search(name: str) -> Config | str:
    """A format for ModelOpt's search: its name, which the result shows, if it means the same.

    ModelOpt counts a weight's code alone for most formats; with its scale there is more to store.
    """
    config = named(name)
    linear = formats.FORMATS[name].linear
    bits = formats.WEIGHTS[linear.weight].bits if linear else 16.0
    if abs(16 * estimate_quant_compression(QuantizeConfig(**config)) - bits) > 1e-6:
        config["effective_bits"] = bits
    return name if config == getattr(modelopt_config, name, None) else config


def method_of(config: Config) -> str:
    """The calibration algorithm's name; empty for none."""
    algorithm = config.get("algorithm")
    if isinstance(algorithm, list):
        return "+".join(method_of({"algorithm": each}) for each in algorithm)
    return str((algorithm.get("method") if isinstance(algorithm, dict) else algorithm) or "")


def as_json(config: Config) -> Any:
    """The configuration with JSON types only, for the manifest."""

    def plain(value: Any) -> Any:
        is_model = hasattr(value, "model_dump")
        return value.model_dump(exclude_unset=True) if is_model else str(value)

    return json.loads(json.dumps(config, default=plain))
