"""What a number format and a quantization format consist of. No torch, no ModelOpt.

A *number format* says how the elements of a tensor are stored (``nvfp4``: E2M1 codes, an E4M3 scale
per 16). A *format* is a choice of the command line: which layers get which number formats, and how
their scales are found (``NVFP4_AWQ_CLIP_CFG``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

PRE_QUANT_SCALE = "pre_quant_scale"
LOW_RANK = "low_rank"
# ModelOpt's algorithms that add something to a linear layer, and what.
EXTRA_OF_METHOD = {
    "smoothquant": PRE_QUANT_SCALE,
    "awq_lite": PRE_QUANT_SCALE,
    "awq_full": PRE_QUANT_SCALE,
    "svdquant": LOW_RANK,
}


@dataclass(frozen=True)
class NumberFormat:
    """How the elements of a weight or input are stored.

    Attributes:
        name: in ``Linear``, messages and the table.
        is_used_by: whether a ModelOpt ``TensorQuantizer`` rounds to this format, judged by its
            ``num_bits``, ``block_sizes`` and ``axis``; None where ``parts`` decides.
        parts: names of the number formats that a ``SequentialQuantizer`` applies one after the
            other; empty for a single quantizer.
        bits: stored per weight, scales included: n weights that share a scale add its bits / n.
        block_size: inputs of a row that share a scale; 1 where there are no blocks.
        largest: what a calibrated maximum is divided by to get the scale that is exported; None
            where nothing is calibrated or the scale is not one per tensor.
        stored_block_scales: block scales lie in a buffer of the quantizer, which ModelOpt cannot
            save at TP > 1.
        exported_as: number format of the input (empty: 16 bits) -> ``quant_algo``.
        refused: why weights of this format are not exported with any other input.
    """

    name: str
    is_used_by: Callable[[Any], bool] | None = None
    parts: tuple[str, ...] = ()
    bits: float = 16.0
    block_size: int = 1
    largest: float | None = None
    stored_block_scales: bool = False
    exported_as: Mapping[str, str] = field(default_factory=dict)
    refused: str = ""


@dataclass(frozen=True)
class Linear:
    """How linear layers are quantized.

    Attributes:
        weight: number format of the weights.
        input: number format of the layer's input; empty if it stays in 16 bits.
        extra: ``pre_quant_scale`` where inputs are multiplied by a factor per channel first,
            ``low_rank`` where a low-rank product is added, ``""`` otherwise.
    """

    weight: str
    input: str = ""
    extra: str = ""


@dataclass(frozen=True)
class Verdict:
    """Whether an engine can load the export.

    Attributes:
        exportable: whether this repository writes it so that engines read it correctly.
        quant_algo: the name in ``hf_quant_config.json``; empty if there is none.
        reason: why it is not exportable; empty otherwise.
        kv_cache_quant_algo: the name for keys and values; empty if they are not quantized.
    """

    exportable: bool
    quant_algo: str = ""
    reason: str = ""
    kv_cache_quant_algo: str = ""


@dataclass(frozen=True)
class Format:
    """What ``--export-quant-cfg`` can name.

    Attributes:
        name: in ModelOpt's ``quantization.config.choices``, or our own.
        spellings: other names; the first is the short name.
        linear: how linear layers are quantized; None where only keys and values are.
        method: ModelOpt's algorithm that finds the scales: ``max``, ``mse``, ``awq_lite``, ...;
            empty where none is needed.
        layers: which linear layers; never the output layer and routers, except ``every``.
        kv: number format of keys and values, a ``KvCache.name``; empty if they stay in 16 bits.
        attention: whether the products inside attention are quantized too.
        broken: why it cannot run on a Megatron model at all; empty if it can.
        quant_cfg: ModelOpt's entries for the quantizers to enable; its own list of layers that are
            never quantized follows. Empty: ModelOpt has a configuration of this name.
    """

    name: str
    spellings: tuple[str, ...]
    linear: Linear | None
    method: str = "max"
    layers: str = "all"
    kv: str = ""
    attention: bool = False
    broken: str = ""
    quant_cfg: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class KvCache:
    """How keys and values are quantized.

    Attributes:
        name: what ``--export-kv-cache-quant`` takes.
        config: ModelOpt's configuration.
        exported_as: ``kv_cache_quant_algo``; empty if no engine reads it.
        refused: why no engine does; empty otherwise.
    """

    name: str
    config: str
    exported_as: str = ""
    refused: str = ""


@dataclass(frozen=True)
class FormatFamily:
    """What a file of this folder registers.

    Attributes:
        formats: in the order of the table.
        weights: number formats of weights; inputs may have them too. The first that a quantizer
            matches is its own.
        inputs: number formats that only inputs have; they are matched before those of weights.
        kv_caches: ways to quantize keys and values.
    """

    formats: tuple[Format, ...] = ()
    weights: tuple[NumberFormat, ...] = ()
    inputs: tuple[NumberFormat, ...] = ()
    kv_caches: tuple[KvCache, ...] = ()


def linear_format(
    name: str, spellings: str, weight: str, inputs: str = "", method: str = "max", **more: Any
) -> Format:
    """A format of linear layers.

    Args:
        spellings: separated by blanks.
        weight: number format of the weights.
        inputs: number format of the inputs; empty: 16 bits.
        more: further fields of :class:`Format`.
    """
    linear = Linear(weight, inputs, EXTRA_OF_METHOD.get(method, ""))
    return Format(name, tuple(spellings.split()), linear, method, **more)


def block_sizes(quantizer: Any) -> dict[Any, Any]:
    """A quantizer's ``block_sizes``: last dimension -1 -> size, ``type``, ``scale_bits``."""
    return dict(quantizer.block_sizes or {})
