"""What a number format and a quantization format consist of. No torch, no ModelOpt.

A *number format* says how the elements of a tensor are stored (``nvfp4``: E2M1 codes, an E4M3 scale
per 16). A *format* is a choice of the command line: which layers get which number formats, and how
their scales are found (``NVFP4_AWQ_CLIP_CFG``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# What is done to a linear layer beside rounding, and why no export has it.
PRE_QUANT_SCALE = (
    "inputs are multiplied by a factor per channel (pre_quant_scale), which ModelOpt's exporter "
    "for Megatron drops or refuses"
)
LOW_RANK = "a low-rank product is added to each linear layer, which no engine computes"
# ModelOpt's algorithms that add something to a linear layer, and what.
EXTRA_OF_METHOD = {"svdquant": LOW_RANK}
# Those whose factors go into the norms before the layers, so that nothing is added.
FOLDED_METHODS = ("smoothquant", "awq_lite", "awq_full")
# Of one replica's losses alone.
AWQ = ("awq_lite", "awq_clip", "awq_full")
# Ours: it changes weights so that their rounding errors compensate one another.
GPTQ = "gptq"
# Value of --export-kv-cache-quant that leaves keys and values in 16 bits.
NO_KV_CACHE = "none"


@dataclass(frozen=True)
class NumberFormat:
    """How the elements of a weight or input are stored.

    Attributes:
        name: in ``Linear``, messages and the table.
        num_bits: of ModelOpt's quantizers of this format: of an integer, or of exponent and
            mantissa; None where ``parts`` decides.
        scale: what has a scale of its own: ``tensor``, ``channel`` (of the output), ``token``
            (found at run time) or ``block``.
        blocks: what the quantizers' ``block_sizes`` have to say: the inputs of a row in a block
            (-1), ``type`` ...; scales that are not rounded have no ``scale_bits``.
        parts: names of the number formats that a ``SequentialQuantizer`` applies one after the
            other; empty for a single quantizer.
        bits: stored per weight, scales included: n weights that share a scale add its bits / n.
        block_size: inputs of a row that share a scale; 1 where there are no blocks.
        block_rows: rows that share a block's scale in the export, which is calibrated a row each.
        largest: what a calibrated maximum is divided by to get the scale that is exported; None
            where nothing is calibrated or the scale is not one per tensor.
        integer: weights are integers with stored maxima, which GPTQ can round to.
        bf16_scales: the scales of weights are numbers of bfloat16, in which engines read them:
            calibration rounds the maxima so.
        stored_block_scales: block scales lie in a buffer of the quantizer, which ModelOpt cannot
            save at TP > 1.
        exported_as: number format of the input (empty: 16 bits) -> ``quant_algo``.
        refused: why weights of this format are not exported with any other input.
    """

    name: str
    num_bits: int | tuple[int, int] | None = None
    scale: str = "tensor"
    blocks: Mapping[Any, Any] = field(default_factory=dict)
    parts: tuple[str, ...] = ()
    bits: float = 16.0
    block_size: int = 1
    block_rows: int = 1
    largest: float | None = None
    integer: bool = False
    bf16_scales: bool = False
    stored_block_scales: bool = False
    exported_as: Mapping[str, str] = field(default_factory=dict)
    refused: str = ""

    @property
    def code_bits(self) -> float:
        """Bits of a weight's code, without its scale."""
        match self.num_bits:
            case int(bits):
                return bits
            case (exponent, mantissa):
                return exponent + mantissa + 1
        return self.bits

    def is_used_by(self, quantizer: Any) -> bool:
        """Whether a ModelOpt ``TensorQuantizer`` rounds to this format."""
        blocks = dict(quantizer.block_sizes or {})
        if quantizer.num_bits != self.num_bits:
            return False
        if self.scale == "token":
            return getattr(quantizer, "_dynamic", False) and blocks.get(-1) is None
        if self.scale == "block":
            wanted = {"scale_bits": None, **self.blocks}
            return bool(blocks) and all(blocks.get(key) == wanted[key] for key in wanted)
        return not blocks and (quantizer.axis is not None) == (self.scale == "channel")


@dataclass(frozen=True)
class Linear:
    """How linear layers are quantized.

    Attributes:
        weight: number format of the weights.
        input: number format of the layer's input; empty if it stays in 16 bits.
        extra: what else is done to them: :data:`PRE_QUANT_SCALE`, :data:`LOW_RANK` or nothing.
    """

    weight: str
    input: str = ""
    extra: str = ""


@dataclass(frozen=True)
class Format:
    """What ``--export-quant-cfg`` can name.

    Attributes:
        name: in ModelOpt's ``quantization.config.choices``, or our own.
        weight: number format of the linear layers' weights; empty where only keys and values are
            quantized.
        input: number format of their inputs; empty: 16 bits.
        method: ModelOpt's algorithm that finds the scales: ``max``, ``mse``, ``awq_lite``, ...; or
            our :data:`GPTQ`; empty where none is needed.
        alias: a further short name; empty if there is none.
        layers: which linear layers; never the output layer and routers, except ``every``.
        kv: number format of keys and values, a ``KvCache.name``.
        attention: whether the products inside attention are quantized too.
        broken: why it cannot run on a Megatron model at all; empty if it can.
        quant_cfg: ModelOpt's entries for the quantizers to enable; its own list of layers that are
            never quantized follows. Empty: ModelOpt has a configuration of this name.
    """

    name: str
    weight: str = ""
    input: str = ""
    method: str = "max"
    alias: str = ""
    layers: str = "all"
    kv: str = NO_KV_CACHE
    attention: bool = False
    broken: str = ""
    quant_cfg: tuple[Mapping[str, Any], ...] = ()

    @property
    def linear(self) -> Linear | None:
        """How linear layers are quantized; None where they are not."""
        extra = EXTRA_OF_METHOD.get(self.method, "")
        return Linear(self.weight, self.input, extra) if self.weight else None

    @property
    def spellings(self) -> list[str]:
        """Other names, the short one first: ``nvfp4`` for ``NVFP4_DEFAULT_CFG``."""
        short = re.sub("(_default)?_(cfg|config)$", "", self.name.lower())
        return [name for name in (short, self.alias) if name] if self.weight else []


@dataclass(frozen=True)
class KvCache:
    """How keys and values are quantized.

    Attributes:
        name: what ``--export-kv-cache-quant`` takes.
        config: ModelOpt's configuration; empty for none.
        exported_as: ``kv_cache_quant_algo``; empty if no engine reads it.
        refused: why no engine does; empty otherwise.
        bits: stored per element, scales included; None where they are in 16 bits or more.
    """

    name: str
    config: str
    exported_as: str = ""
    refused: str = ""
    bits: float | None = None


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
