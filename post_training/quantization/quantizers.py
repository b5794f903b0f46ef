"""Quantizers in a model: ModelOpt's configuration, calibration, and what the result is.

The steps are taken apart, so that mistakes show before the work: :func:`configuration` builds what
ModelOpt is given, :func:`insert` places quantizers without calibrating them, :func:`verdict` says
what they can be exported as, :func:`calibrate` finds the scales. What was quantized, and whether
anything was missed, is in ``coverage.py``.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from post_training.common.errors import UsageError
from post_training.quantization import formats, recipes
from post_training.quantization.formats import Format, Linear, Verdict
from post_training.quantization.recipes import Recipe

if TYPE_CHECKING:
    from modelopt.torch.quantization.nn import TensorQuantizer

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
    """A copy of ModelOpt's configuration of this name, complete in itself.

    Those for keys and values are meant to be merged: alone, ModelOpt would quantize every weight
    with its default, INT8.
    """
    from modelopt.torch.quantization import config as modelopt_config

    config: Config = copy.deepcopy(getattr(modelopt_config, name))
    if formats.FORMATS[name].linear is None:
        config["quant_cfg"] = [{"quantizer_name": "*", "enable": False}, *config["quant_cfg"]]
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
    import modelopt.torch.quantization as mtq

    with quiet(), _own_check():
        mtq.quantize(model, {**config, "algorithm": None})


def calibrate(
    model: torch.nn.Module, config: Config, forward_loop: Callable[[torch.nn.Module], None] | None
) -> None:
    """Find the scales with the configuration's algorithm; a collective call.

    Args:
        forward_loop: runs the calibration data through the model; None where no scale needs it.
    """
    import modelopt.torch.quantization as mtq

    if config.get("algorithm"):
        with quiet():
            mtq.calibrate(model, config["algorithm"], forward_loop=forward_loop)


def needs_data(model: torch.nn.Module, config: Config) -> bool:
    """Whether calibration looks at data; the same answer on all ranks."""
    if method_of(config) in ("", "max"):
        wanted = any(
            needs_amax(quantizer) and "weight_quantizer" not in name
            for name, quantizer in quantizers(model)
        )
        return bool(method_of(config)) and any(from_all_ranks(wanted))
    return True


def quantizers(model: torch.nn.Module) -> Iterator[tuple[str, TensorQuantizer]]:
    """Name and quantizer of each that is enabled."""
    from modelopt.torch.quantization.nn import TensorQuantizer

    for name, module in model.named_modules():
        if isinstance(module, TensorQuantizer) and module.is_enabled:
            yield name, module


def needs_amax(quantizer: TensorQuantizer) -> bool:
    """Whether the quantizer computes with a stored maximum.

    Microscaling formats take a power of two from each block, dynamic ones look at each input, and
    some recipes fix the constant.
    """
    is_dynamic = quantizer.is_mx_format or getattr(quantizer, "_dynamic", False)
    return not (is_dynamic or getattr(quantizer, "_use_constant_amax", False))


def weight_form(quantizer: Any) -> str:
    """Numbers of a weight quantizer: a key of ``formats.WEIGHT_BITS``, or a description."""
    from modelopt.torch.quantization.nn import SequentialQuantizer

    if isinstance(quantizer, SequentialQuantizer):
        forms = [weight_form(each) for each in quantizer]
        return "int4_block_fp8" if forms == ["int4_block", "fp8"] else "+".join(forms)
    bits, blocks, axis = quantizer.num_bits, dict(quantizer.block_sizes or {}), quantizer.axis
    size, scale_bits = blocks.get(-1), blocks.get("scale_bits")
    if scale_bits == (8, 0) and size == 32:
        kinds = {(2, 1): "mxfp4", (3, 2): "mxfp6", (4, 3): "mxfp8", 8: "mxint8"}
        if bits in kinds:
            return kinds[bits]
    if bits == (2, 1) and scale_bits == (4, 3):
        form = "nvfp4" if blocks.get("type") == "dynamic" else "nvfp4_static"
        if blocks.get("four_over_six"):
            form = "nvfp4_4over6"
        return form if size == 16 else f"nvfp4_block{size}"
    if bits == 4 and blocks:
        return "int4_block"
    kind = {8: "int8", (4, 3): "fp8"}.get(bits)
    if kind and blocks:
        return f"{kind}_block"
    if kind:
        return kind if axis is None else f"{kind}_channel"
    return f"{bits} bits with blocks {blocks} and axis {axis}"


def input_form(quantizer: Any) -> str:
    """Numbers of an input quantizer, as ``Linear.input``; empty if it is off."""
    if quantizer is None or not quantizer.is_enabled:
        return ""
    blocks = dict(quantizer.block_sizes or {})
    if getattr(quantizer, "_dynamic", False) and blocks.get(-1) is None:
        return {(4, 3): "fp8_token", 8: "int8_token"}.get(quantizer.num_bits, "token")
    return weight_form(quantizer)


def linear_form(module: torch.nn.Module, method: str = "") -> Linear | None:
    """How a linear layer is quantized; None if its weight is plain.

    Args:
        method: of the calibration that is still to come, which may add to the layer.
    """
    quantizer: Any = getattr(module, "weight_quantizer", None)
    if quantizer is None or not quantizer.is_enabled:
        return None
    inputs: Any = getattr(module, "input_quantizer", None)
    extra = ""
    if method in ("awq_lite", "awq_full", "smoothquant") or hasattr(inputs, "_pre_quant_scale"):
        extra = "pre_quant_scale"
    if method == "svdquant" or hasattr(quantizer, "svdquant_lora_a"):
        extra = "low_rank"
    return Linear(weight_form(quantizer), input_form(inputs), extra)


def kv_form(model: torch.nn.Module) -> tuple[str, bool]:
    """How keys and values are quantized (or empty), and whether attention's products are too."""
    forms, attention = set(), False
    for name, quantizer in quantizers(model):
        kind = name.rpartition(".")[2]
        if kind in ("k_bmm_quantizer", "v_bmm_quantizer"):
            form = weight_form(quantizer)
            form += "_affine" if quantizer.bias else ""
            form += "_rotate" if quantizer.rotate_is_enabled else ""
            forms.add(form)
        elif kind in ("q_bmm_quantizer", "p_bmm_quantizer", "softmax_quantizer"):
            attention = True
    # Rotation is on the keys alone.
    form = "nvfp4_rotate" if "nvfp4_rotate" in forms else "+".join(sorted(forms))
    return form, attention


def verdict(model: torch.nn.Module, method: str = "") -> Verdict:
    """What the model can be exported as; the same on all ranks, a collective call.

    Args:
        method: of the calibration that is still to come.
    """
    forms = [linear_form(module, method) for module in model.modules()]
    output = getattr(model, "output_layer", None)
    tied = bool(getattr(model, "share_embeddings_and_output_weights", False))
    tied_output = output is not None and tied and linear_form(output) is not None
    mine = ([form for form in forms if form is not None], *kv_form(model), tied_output)
    gathered = from_all_ranks(mine)
    if any(each[3] for each in gathered):
        return Verdict(
            False, reason="the output layer is quantized, and the embedding shares its weight"
        )
    return formats.judge(
        [form for each in gathered for form in each[0]],
        next((each[1] for each in gathered if each[1]), ""),
        attention=any(each[2] for each in gathered),
    )


def require_exportable(model: torch.nn.Module, method: str = "") -> Verdict:
    """:func:`verdict`, as an error unless the model can be exported; a collective call."""
    found = verdict(model, method)
    if not found.exportable:
        raise formats.unexportable("the quantized model", found)
    return found


def require_savable(model: torch.nn.Module) -> None:
    """Raise UsageError, before calibration, for scales that ModelOpt cannot save at TP > 1."""
    from megatron.core import parallel_state

    size = parallel_state.get_tensor_model_parallel_world_size()
    forms = {form.weight for form in map(linear_form, model.modules()) if form is not None}
    static = sorted(forms & formats.STATIC_BLOCKS)
    if size > 1 and any(from_all_ranks(static)):
        raise UsageError(
            f"{', '.join(static) or 'stored block scales'} with TP={size}",
            "ModelOpt cannot save stored block scales that are split over ranks",
            "set TP=1; PP may be larger",
        )


def compress(model: torch.nn.Module) -> None:
    """Replace fake-quantized weights by packed ones, in place."""
    import modelopt.torch.quantization as mtq

    with quiet():
        mtq.compress(model)


def unpack(model: torch.nn.Module) -> int:
    """Undo :func:`compress` in place: weights in 16 bits that quantize to the same codes.

    For the exporter, which splits fused weights and packs the parts. Returns how many there were.
    """
    from modelopt.torch.quantization.qtensor import QTensorWrapper

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
    import modelopt.torch.quantization as mtq

    mtq.disable_quantizer(model, "*input_quantizer")


def with_option(algorithm: Any, name: str, value: Any) -> Any:
    """A copy of a configuration's ``algorithm`` with one more option."""
    if isinstance(algorithm, dict):
        return {**algorithm, name: value}
    return {"method": algorithm, name: value}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep ModelOpt's progress prints off stdout; its warnings and our log stay."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


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


def from_all_ranks(value: Any) -> list[Any]:
    """``value`` of every rank, in order; a collective call."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, value)
    return gathered
