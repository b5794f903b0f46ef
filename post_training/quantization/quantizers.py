"""Quantizing a model with ModelOpt, in steps, so that mistakes show before the work.

:func:`configuration` builds what ModelOpt is given, :func:`insert` places quantizers without
calibrating them, :func:`judge_model` says what they can be exported as, :func:`calibrate` finds the
scales. ``probe.py`` reads the quantizers of a model; ``coverage.py`` says what was quantized, and
whether anything was missed.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from megatron.core import parallel_state
from modelopt.torch.quantization import config as modelopt_config
from modelopt.torch.quantization.qtensor import QTensorWrapper

from post_training.common.errors import UsageError
from post_training.common.quiet import quiet
from post_training.distributed.collectives import from_all_ranks
from post_training.quantization import formats, probe, recipes
from post_training.quantization.formats import Format, Verdict
from post_training.quantization.recipes import Recipe

logger = logging.getLogger(__name__)

Config = dict[str, Any]

# Megatron's names for what a recipe calls by Hugging Face's: the linear that holds its rows.
_MEGATRON_NAMES = (
    (re.compile(r"(?<![a-z])o_proj"), "linear_proj"),
    (re.compile(r"(?<![a-z])[qkv]_proj"), "linear_qkv"),
    (re.compile(r"(?<![a-z])(gate_up|gate|up)_proj"), "linear_fc1"),
    (re.compile(r"(?<![a-z])down_proj"), "linear_fc2"),
)
# Linears that compute queries, keys and values; with multi-latent attention there are several.
QKV_PATTERNS = ("*.linear_qkv.*", "*.linear_q_*proj.*", "*.linear_kv_*proj.*")
ALL_OFF: Config = {"quantizer_name": "*", "enable": False}
_SKIP_CHECK = "MODELOPT_SKIP_WEIGHT_QUANT_CHECK"


def configuration(
    choice: Format | Recipe,
    *,
    weight_only: bool = False,
    disable_qkv: bool = False,
    kv_cache: str = "none",
) -> Config:
    """ModelOpt's ``quant_cfg`` and ``algorithm`` for a format or recipe, flags applied.

    Args:
        choice: a format of the table, or a recipe of type ``ptq``.
        weight_only: leave inputs in 16 bits.
        disable_qkv: leave the linears that compute queries, keys and values plain. Unlike in
            Megatron-LM, which disables all of attention, the output projection and the KV cache
            stay quantized.
        kv_cache: a key of ``formats.KV_CACHE``.
    """
    if isinstance(choice, Recipe):
        quantize = recipes.load(choice).quantize
        config: Config = quantize.model_dump(exclude_unset=True)
    else:
        config = named(choice.name)
    entries = [*_with_megatron_names(config["quant_cfg"])]
    if weight_only:
        entries.append({"quantizer_name": "*input_quantizer", "enable": False})
    if disable_qkv:
        entries += [{"quantizer_name": pattern, "enable": False} for pattern in QKV_PATTERNS]
    cache = formats.KV_CACHE[kv_cache][0]
    if cache:
        entries += cache_entries(cache)
    config["quant_cfg"] = entries
    if cache and not config.get("algorithm"):
        # Keys and values need a maximum even where the weights' scales need no calibration.
        config["algorithm"] = "max"
    return config


def named(name: str) -> Config:
    """A copy of the configuration of a format, complete in itself.

    ModelOpt's for keys and values are meant to be merged: alone, ModelOpt would quantize every
    weight with its default, INT8.
    """
    row = formats.FORMATS[name]
    if row.quant_cfg:
        own = [*row.quant_cfg, *modelopt_config._default_disabled_quantizer_cfg]
        return copy.deepcopy({"quant_cfg": [dict(ALL_OFF), *own], "algorithm": row.method or None})
    config: Config = copy.deepcopy(getattr(modelopt_config, name))
    if row.linear is None:
        config["quant_cfg"] = [dict(ALL_OFF), *config["quant_cfg"]]
    config.setdefault("algorithm", "max")
    return config


def cache_entries(name: str) -> list[Config]:
    """The entries of a configuration for keys and values, to append to another one's."""
    entries: list[Config] = named(name)["quant_cfg"][1:]
    return entries


def _with_megatron_names(entries: list[Config]) -> Iterator[Config]:
    """Each entry, followed by the same for Megatron's name of the layer it means."""
    given = {entry["quantizer_name"] for entry in entries}
    for entry in entries:
        yield entry
        name = entry["quantizer_name"]
        for pattern, ours in _MEGATRON_NAMES:
            translated = pattern.sub(ours, name)
            if translated != name and translated not in given:
                given.add(translated)
                logger.debug("recipe: %s also stands for %s", name, translated)
                yield {**copy.deepcopy(entry), "quantizer_name": translated}


def method_of(config: Config) -> str:
    """The calibration algorithm's name; empty for none."""
    algorithm = config.get("algorithm")
    if isinstance(algorithm, list):
        return "+".join(method_of({"algorithm": each}) for each in algorithm)
    if isinstance(algorithm, dict):
        return str(algorithm.get("method") or "")
    return str(algorithm or "")


def as_json(config: Config) -> Any:
    """The configuration with JSON types only, for the manifest."""

    def plain(value: Any) -> Any:
        if hasattr(value, "model_dump"):
            return plain(value.model_dump(exclude_unset=True))
        if isinstance(value, dict):
            return {str(key): plain(each) for key, each in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(each) for each in value]
        return value if isinstance(value, (int, float, str, bool, type(None))) else str(value)

    return plain(config)


def insert(model: torch.nn.Module, config: Config) -> None:
    """Place quantizers as ``config`` says, without scales. Changes ``model`` in place."""
    with quiet(stdout=True), _own_check():
        mtq.quantize(model, {**config, "algorithm": None})


def calibrate(
    model: torch.nn.Module, config: Config, forward_loop: Callable[[torch.nn.Module], None] | None
) -> None:
    """Find the scales with the configuration's algorithm; a collective call.

    Args:
        forward_loop: runs the calibration data through the model; None where no scale needs it.
    """
    if config.get("algorithm"):
        with quiet(stdout=True):
            mtq.calibrate(model, config["algorithm"], forward_loop=forward_loop)


def needs_data(model: torch.nn.Module, config: Config) -> bool:
    """Whether calibration looks at data; the same answer on all ranks."""
    if method_of(config) in ("", "max"):
        wanted = any(
            probe.needs_amax(quantizer) and "weight_quantizer" not in name
            for name, quantizer in probe.enabled(model)
        )
        return bool(method_of(config)) and any(from_all_ranks(wanted))
    return True


def judge_model(model: torch.nn.Module, method: str = "") -> Verdict:
    """What the model can be exported as; the same on all ranks, a collective call.

    Args:
        method: of the calibration that is still to come.
    """
    found = [probe.linear_of(module, method) for module in model.modules()]
    output = getattr(model, "output_layer", None)
    tied = bool(getattr(model, "share_embeddings_and_output_weights", False))
    tied_output = output is not None and tied and probe.linear_of(output) is not None
    mine = ([each for each in found if each is not None], *probe.kv_format(model), tied_output)
    gathered = from_all_ranks(mine)
    if any(each[3] for each in gathered):
        return Verdict(
            False, reason="the output layer is quantized, and the embedding shares its weight"
        )
    return formats.judge(
        [linear for each in gathered for linear in each[0]],
        next((each[1] for each in gathered if each[1]), ""),
        attention=any(each[2] for each in gathered),
    )


def require_exportable(model: torch.nn.Module, method: str = "") -> Verdict:
    """:func:`judge_model`, as an error unless the model can be exported; a collective call."""
    found = judge_model(model, method)
    if not found.exportable:
        raise formats.unexportable("the quantized model", found)
    return found


def require_savable(model: torch.nn.Module) -> None:
    """Raise UsageError, before calibration, for scales that ModelOpt cannot save at TP > 1."""
    size = parallel_state.get_tensor_model_parallel_world_size()
    linears = filter(None, map(probe.linear_of, model.modules()))
    static = sorted({linear.weight for linear in linears} & formats.STATIC_BLOCKS)
    if size > 1 and any(from_all_ranks(static)):
        raise UsageError(
            f"{', '.join(static) or 'stored block scales'} with TP={size}",
            "ModelOpt cannot save stored block scales that are split over ranks",
            "set TP=1; PP may be larger",
        )


def compress(model: torch.nn.Module) -> None:
    """Replace fake-quantized weights by packed ones, in place."""
    with quiet(stdout=True):
        mtq.compress(model)


def unpack(model: torch.nn.Module) -> int:
    """Undo :func:`compress` in place: weights in 16 bits that quantize to the same codes.

    For the exporter, which splits fused weights and packs the parts. Returns how many there were.
    """
    count = 0
    for module in model.modules():
        packed: Any = module._parameters.get("weight")
        quantizer: Any = getattr(module, "weight_quantizer", None)
        if isinstance(packed, QTensorWrapper) and quantizer is not None:
            weight = quantizer.dequantize(packed)
            quantizer._fake_quant, quantizer._dequantize = True, False
            parameter = torch.nn.Parameter(weight, requires_grad=False)
            # ModelOpt's own dictionary of parameters would pack it again.
            dict.__setitem__(module._parameters, "weight", parameter)
            count += 1
    return count


def disable_inputs(model: torch.nn.Module) -> None:
    """Switch every input quantizer off, in place."""
    mtq.disable_quantizer(model, "*input_quantizer")


def with_option(algorithm: Any, name: str, value: Any) -> Any:
    """A copy of a configuration's ``algorithm`` with one more option."""
    if isinstance(algorithm, dict):
        return {**algorithm, name: value}
    return {"method": algorithm, name: value}


@contextlib.contextmanager
def _own_check() -> Iterator[None]:
    """Without ModelOpt's check that a weight quantizer is enabled.

    It looks at one rank, which would leave the others waiting; ``coverage.py`` asks all of them.
    """
    before = os.environ.get(_SKIP_CHECK)
    os.environ[_SKIP_CHECK] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_SKIP_CHECK]
        else:
            os.environ[_SKIP_CHECK] = before
