"""Quantization formats: their names, what they do to a model, and which engines read the result.

``FORMATS`` has one row for each name of ModelOpt's ``quantization.config.choices``; the names of
its presets and of its older examples are other spellings. What can be exported follows from the
numbers alone (:func:`judge`), so the same rules serve a name typed on the command line, a recipe
and a quantized model. Nothing here imports torch or ModelOpt.

Engines and GPUs are those of vLLM 0.24 (its ``quantization/modelopt.py``); TensorRT-LLM and SGLang
as far as their sources name the algorithm.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from post_training.common.errors import UsageError, suggest

AUTO = "auto"
DEFAULT = "FP8_DEFAULT_CFG"
# What --export-kv-cache-quant takes -> ModelOpt's configuration, the form of the keys and values.
KV_CACHE = {
    "none": ("", ""),
    "fp8": ("FP8_KV_CFG", "fp8"),
    "fp8_affine": ("FP8_AFFINE_KV_CFG", "fp8_affine"),
    "nvfp4": ("NVFP4_KV_CFG", "nvfp4"),
    "nvfp4_affine": ("NVFP4_AFFINE_KV_CFG", "nvfp4_affine"),
    "nvfp4_rotate": ("NVFP4_KV_ROTATE_CFG", "nvfp4_rotate"),
}


@dataclass(frozen=True)
class Linear:
    """How linear layers are quantized.

    Attributes:
        weight: numbers of the weights, a key of ``WEIGHT_BITS``.
        input: numbers of the layer's input: ``""`` (not quantized), ``fp8``, ``fp8_token`` (one
            scale a token, found at run time), ``nvfp4``, ``int8``, ``mxfp8``, ...
        extra: ``pre_quant_scale`` where inputs are multiplied by a factor per channel first,
            ``low_rank`` where a second, small product is added, ``""`` otherwise.
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
    """One row of the table.

    Attributes:
        name: in ModelOpt's ``choices``.
        spellings: other names; the first is ModelOpt's preset.
        linear: how linear layers are quantized; None where only keys and values are.
        method: ModelOpt's algorithm that finds the scales: ``max``, ``mse``, ``awq_lite``, ...;
            empty where none is needed.
        layers: which linear layers; never the output layer and routers, except ``every``.
        kv: how keys and values are quantized: a key of ``KV_ALGORITHMS``, or empty.
        attention: whether the products inside attention are quantized too.
        broken: why it cannot run on a Megatron model at all; empty if it can.
    """

    name: str
    spellings: tuple[str, ...]
    linear: Linear | None
    method: str = "max"
    layers: str = "all"
    kv: str = ""
    attention: bool = False
    broken: str = ""

    @property
    def needs_data(self) -> bool:
        """Whether calibration data decides any scale."""
        if self.kv or self.method not in ("", "max"):
            return True
        return self.linear is not None and self.linear.input in ("fp8", "int8", "nvfp4")


# Stored bits per weight, scales included. Blocks of n weights share a scale: + scale bits / n.
WEIGHT_BITS = {
    "fp8": 8.0,
    "fp8_channel": 8.0,
    "fp8_block": 8.0,  # a float32 per 128 x 128
    "int8": 8.0,
    "int8_channel": 8.0,
    "int4_block": 4.125,  # a bf16 per 128
    "int4_block_fp8": 4.125,
    "nvfp4": 4.5,  # an E4M3 per 16
    "nvfp4_static": 4.5,
    "nvfp4_4over6": 4.5,
    "nvfp4_block32": 4.25,
    "mxfp4": 4.25,  # an E8M0 per 32
    "mxfp6": 6.25,
    "mxfp8": 8.25,
    "mxint8": 8.25,
}
# Inputs of a row that share a scale, where there are blocks.
BLOCK_SIZES = {
    "fp8_block": 128,
    "int4_block": 128,
    "int4_block_fp8": 128,
    "nvfp4": 16,
    "nvfp4_static": 16,
    "nvfp4_4over6": 16,
    "nvfp4_block32": 32,
    "mxfp4": 32,
    "mxfp6": 32,
    "mxfp8": 32,
    "mxint8": 32,
}
# Weights whose block scales lie in a buffer of the quantizer: ModelOpt cannot save it at TP > 1.
STATIC_BLOCKS = frozenset(("nvfp4_static", "nvfp4_4over6"))
_PRE_SCALED = frozenset(("smoothquant", "awq_lite", "awq_full"))


def _row(name: str, spellings: str, weight: str, inputs: str = "", **more: Any) -> Format:
    method = more.get("method", "max")
    extra = "pre_quant_scale" if method in _PRE_SCALED else ""
    extra = "low_rank" if method == "svdquant" else extra
    return Format(name, tuple(spellings.split()), Linear(weight, inputs, extra), **more)


_ROWS = (
    _row("FP8_DEFAULT_CFG", "fp8", "fp8", "fp8"),
    _row("FP8_PER_CHANNEL_PER_TOKEN_CFG", "fp8_per_channel_per_token fp8_pc_pt", "fp8_channel",
         "fp8_token"),
    _row("FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG", "fp8_2d_blockwise_weight_only fp8_pb_wo", "fp8_block"),
    _row("MAMBA_MOE_FP8_AGGRESSIVE_CFG", "mamba_moe_fp8_aggressive", "fp8", "fp8",
         layers="all but attention"),
    _row("MAMBA_MOE_FP8_CONSERVATIVE_CFG", "mamba_moe_fp8_conservative", "fp8", "fp8",
         layers="all but attention and Mamba"),
    _row("NVFP4_DEFAULT_CFG", "nvfp4", "nvfp4", "nvfp4"),
    _row("NVFP4_MLP_ONLY_CFG", "nvfp4_mlp_only", "nvfp4", "nvfp4", layers="MLP"),
    _row("NVFP4_OMLP_ONLY_CFG", "nvfp4_omlp_only", "nvfp4", "nvfp4",
         layers="MLP and attention output"),
    _row("NVFP4_EXPERTS_ONLY_CFG", "nvfp4_experts_only", "nvfp4", "nvfp4", layers="experts"),
    _row("MAMBA_MOE_NVFP4_AGGRESSIVE_CFG", "mamba_moe_nvfp4_aggressive", "nvfp4", "nvfp4",
         layers="all but attention"),
    _row("MAMBA_MOE_NVFP4_CONSERVATIVE_CFG", "mamba_moe_nvfp4_conservative", "nvfp4", "nvfp4",
         layers="all but attention and Mamba"),
    _row("NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG", "nvfp4_w4a4_weight_mse_fp8_sweep nvfp4_mse",
         "nvfp4_static", "nvfp4", method="mse"),
    _row("NVFP4_W4A4_WEIGHT_LOCAL_HESSIAN_CFG",
         "nvfp4_w4a4_weight_local_hessian nvfp4_local_hessian", "nvfp4_static", "nvfp4",
         method="local_hessian"),
    _row("NVFP4_FOUR_OVER_SIX_CFG", "nvfp4_four_over_six", "nvfp4_4over6", "nvfp4", method="mse"),
    _row("NVFP4_AWQ_LITE_CFG", "nvfp4_awq_lite nvfp4_awq", "nvfp4", "nvfp4", method="awq_lite"),
    _row("NVFP4_AWQ_CLIP_CFG", "nvfp4_awq_clip", "nvfp4", "nvfp4", method="awq_clip"),
    _row("NVFP4_AWQ_FULL_CFG", "nvfp4_awq_full", "nvfp4", "nvfp4", method="awq_full"),
    _row("NVFP4_SVDQUANT_DEFAULT_CFG", "nvfp4_svdquant", "nvfp4", "nvfp4", method="svdquant",
         broken="ModelOpt adds its low-rank product to a tensor, and a Megatron linear returns a "
         "tensor and a bias"),
    _row("NVFP4_FP8_MHA_CONFIG", "nvfp4_fp8_mha", "nvfp4", "nvfp4", layers="every", kv="fp8",
         attention=True),
    _row("W4A16_NVFP4_CFG", "w4a16_nvfp4", "nvfp4"),
    _row("NVFP4_MLP_WEIGHT_ONLY_CFG", "nvfp4_mlp_weight_only", "nvfp4_block32", layers="MLP"),
    _row("W4A8_NVFP4_FP8_CFG", "w4a8_nvfp4_fp8", "nvfp4_block32", "fp8"),
    _row("MXFP8_DEFAULT_CFG", "mxfp8", "mxfp8", "mxfp8", method=""),
    _row("MXFP6_DEFAULT_CFG", "mxfp6", "mxfp6", "mxfp6", method=""),
    _row("MXFP4_DEFAULT_CFG", "mxfp4", "mxfp4", "mxfp4", method=""),
    _row("MXFP4_MLP_WEIGHT_ONLY_CFG", "mxfp4_mlp_weight_only", "mxfp4", method="", layers="MLP"),
    _row("W4A8_MXFP4_FP8_CFG", "w4a8_mxfp4_fp8", "mxfp4", "fp8", method=""),
    _row("MXINT8_DEFAULT_CFG", "mxint8", "mxint8", "mxint8", method=""),
    _row("INT8_DEFAULT_CFG", "int8", "int8_channel", "int8"),
    _row("INT8_SMOOTHQUANT_CFG", "int8_smoothquant int8_sq", "int8_channel", "int8",
         method="smoothquant"),
    _row("INT8_WEIGHT_ONLY_CFG", "int8_weight_only int8_wo", "int8_channel"),
    _row("INT4_AWQ_CFG", "int4_awq", "int4_block", method="awq_lite"),
    _row("INT4_BLOCKWISE_WEIGHT_ONLY_CFG", "int4_blockwise_weight_only", "int4_block"),
    _row("W4A8_AWQ_BETA_CFG", "w4a8_awq_beta w4a8_awq", "int4_block_fp8", "fp8",
         method="awq_lite"),
    Format("FP8_KV_CFG", (), None, kv="fp8"),
    Format("FP8_AFFINE_KV_CFG", (), None, kv="fp8_affine"),
    Format("NVFP4_KV_CFG", (), None, kv="nvfp4"),
    Format("NVFP4_AFFINE_KV_CFG", (), None, kv="nvfp4_affine"),
    Format("NVFP4_KV_ROTATE_CFG", (), None, kv="nvfp4_rotate"),
)  # fmt: skip

FORMATS: dict[str, Format] = {row.name: row for row in _ROWS}
SPELLINGS: dict[str, str] = {
    spelling: row.name for row in _ROWS for spelling in (row.name, *row.spellings)
}

# quant_algo -> (engines, GPUs). Weights alone: they are unpacked, and inputs stay in 16 bits.
ENGINES: dict[str, tuple[str, str]] = {
    "FP8": ("vLLM, TensorRT-LLM, SGLang", "Ada, Hopper, Blackwell"),
    "NVFP4": (
        "vLLM, TensorRT-LLM, SGLang",
        "Blackwell; weights alone on Ampere, Ada, Hopper (vLLM)",
    ),
    "W4A16_NVFP4": ("vLLM", "Ampere, Ada, Hopper, Blackwell"),
    "MXFP8": ("vLLM", "Blackwell; weights alone on Ampere, Ada, Hopper (vLLM)"),
    "MIXED_PRECISION": ("vLLM, TensorRT-LLM", "those of the formats inside"),
}
KV_ALGORITHMS = {"fp8": "FP8", "nvfp4": "NVFP4"}
# vLLM reads these side by side in one model; other layers would silently be taken as plain.
MIXABLE = frozenset(("FP8", "NVFP4", "W4A16_NVFP4"))

_ALGORITHMS = {
    ("fp8", "fp8"): "FP8",
    ("nvfp4", "nvfp4"): "NVFP4",
    ("nvfp4_static", "nvfp4"): "NVFP4",
    ("nvfp4", ""): "W4A16_NVFP4",
    ("nvfp4_static", ""): "W4A16_NVFP4",
    ("mxfp8", "mxfp8"): "MXFP8",
}
_REFUSED = {
    "fp8": "weights alone are FP8, and the engines' FP8 layers need a static input scale",
    "fp8_channel": "ModelOpt's exporter cannot split one scale per row into q, k and v",
    "fp8_block": "ModelOpt's scales of 128 x 128 blocks do not follow the split into q, k, v and "
    "gate, up",
    "int8": "vLLM reads no INT8 that ModelOpt writes",
    "int8_channel": "vLLM reads no INT8 that ModelOpt writes",
    "int4_block": "ModelOpt's exporter writes INT4 without a configuration, as if it were plain",
    "int4_block_fp8": "vLLM reads no INT4 with FP8 inputs that ModelOpt writes",
    "nvfp4_4over6": "ModelOpt's packer rounds some of its block scales to another value than "
    "calibration did",
    "nvfp4_block32": "blocks of 32 weights share a scale, and NVFP4 kernels read blocks of 16",
    "mxfp4": "vLLM reads no MXFP4 that ModelOpt writes",
    "mxfp6": "no engine reads MXFP6",
    "mxint8": "no engine reads MXINT8",
}
_REFUSED_EXTRA = {
    "pre_quant_scale": "inputs are multiplied by a factor per channel (pre_quant_scale), which "
    "ModelOpt's exporter for Megatron drops or refuses",
    "low_rank": "a low-rank product is added to each linear layer, which no engine computes",
}
_REFUSED_KV = {
    "fp8_affine": "engines read no zero points of keys and values",
    "nvfp4_affine": "engines read no zero points of keys and values",
    "nvfp4_rotate": "engines do not rotate keys",
}


def judge(linears: Iterable[Linear], kv: str = "", *, attention: bool = False) -> Verdict:
    """What quantized layers can be exported as.

    Args:
        linears: the distinct ways in which linear layers are quantized; plain layers left out.
        kv: how keys and values are quantized, or empty.
        attention: whether queries or probabilities are quantized too.
    """
    distinct = sorted(set(linears), key=lambda linear: (linear.weight, linear.input))
    if attention:
        return Verdict(False, reason="engines do not quantize queries and attention probabilities")
    if kv and kv not in KV_ALGORITHMS:
        return Verdict(False, reason=_REFUSED_KV.get(kv, f"no engine reads {kv} keys and values"))
    algorithms = set()
    for linear in distinct:
        algorithm = _ALGORITHMS.get((linear.weight, linear.input))
        if linear.extra or algorithm is None:
            reason = _REFUSED_EXTRA.get(linear.extra) or _REFUSED.get(linear.weight)
            inputs = linear.input or "16-bit"
            return Verdict(
                False, reason=reason or f"no engine reads {linear.weight} with {inputs} inputs"
            )
        algorithms.add(algorithm)
    if not algorithms:
        if kv:
            return Verdict(False, reason="engines read scales of keys and values only in a model "
                           "whose weights are quantized")  # fmt: skip
        return Verdict(True)
    if len(algorithms) > 1 and not algorithms <= MIXABLE:
        return Verdict(False, reason=f"vLLM does not mix {', '.join(sorted(algorithms))}")
    name = algorithms.pop() if len(algorithms) == 1 else "MIXED_PRECISION"
    return Verdict(True, name, kv_cache_quant_algo=KV_ALGORITHMS.get(kv, ""))


def verdict(row: Format, *, weight_only: bool = False, kv_cache: str = "none") -> Verdict:
    """What a format can be exported as, with the flags that change it.

    Args:
        weight_only: ``--weight-only``: inputs stay in 16 bits.
        kv_cache: value of ``--export-kv-cache-quant``.
    """
    linears = []
    if row.linear is not None:
        linear = row.linear
        linears = [Linear(linear.weight, "", linear.extra) if weight_only else linear]
    return judge(linears, KV_CACHE[kv_cache][1] or row.kv, attention=row.attention)


def unexportable(what: str, found: Verdict) -> UsageError:
    """The error for a format that no engine would read correctly."""
    return UsageError(
        what,
        f"its export would not be read correctly: {found.reason}",
        "choose an exportable format (README.md has the table), or give --allow-unexportable to "
        "score it without an engine",
    )


def find(name: str, option: str = "--export-quant-cfg") -> Format:
    """The format of a name in any spelling, upper or lower case.

    Raises:
        UsageError: naming the nearest ones.
    """
    by_lower = {spelling.lower(): row for spelling, row in SPELLINGS.items()}
    key = name.lower()
    if key in by_lower:
        return FORMATS[by_lower[key]]
    if f"{key}_cfg" in by_lower:
        return FORMATS[by_lower[f"{key}_cfg"]]
    raise UsageError(
        f"{option} {name}",
        f"no quantization format has this name; there are {len(FORMATS)}, {AUTO}, and recipes",
        suggest(name, [*SPELLINGS, AUTO]) or f"for instance {DEFAULT}; README.md has the table",
    )


def is_recipe(name: str) -> bool:
    """Whether a positional name means a recipe file, by the original's rule."""
    return "/" in name or name.endswith((".yaml", ".yml"))


def markdown_table() -> str:
    """The table of README.md: one line a format, and one for each algorithm's engines."""
    lines = [
        "| format | short name | weights: bits | inputs | layers | exported as |",
        "|---|---|---|---|---|---|",
    ]
    for row in FORMATS.values():
        found = verdict(row)
        exported = found.quant_algo if found.exportable else f"no: {found.reason}"
        short = f"`{row.spellings[0]}`" if row.spellings else ""
        if row.linear is None:
            cells = ["", f"keys and values: {row.kv}", "", "no: use --export-kv-cache-quant"]
        else:
            bits = f"{row.linear.weight}: {WEIGHT_BITS[row.linear.weight]:g}"
            cells = [bits, row.linear.input or "16-bit", row.layers, exported]
        lines.append(f"| `{row.name}` | {short} | {' | '.join(cells)} |")
    lines += ["", "| exported as | engines | GPUs |", "|---|---|---|"]
    lines += [f"| {name} | {engines} | {gpus} |" for name, (engines, gpus) in ENGINES.items()]
    return "\n".join(lines) + "\n"
