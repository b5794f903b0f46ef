"""What the command line says about quantization, checked without torch.

A name of the table, a recipe file, or ``auto``; and whether the result could be exported and saved.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import ClassVar

from post_training.common.errors import UsageError
from post_training.config.checks import at_least, positive
from post_training.config.flags import flag, group
from post_training.config.options import StageOptions
from post_training.data.options import CalibrationOptions
from post_training.inference.smoke_generation import SmokeOptions
from post_training.models.architecture import Architecture
from post_training.quantization import kernels, recipes
from post_training.quantization.formats import exportable
from post_training.quantization.formats import registry as formats
from post_training.quantization.formats.base import FOLDED_METHODS, GPTQ, NO_KV_CACHE, Format
from post_training.quantization.recipes import Recipe

Choice = Format | Recipe | str
# Values of --export-real-quant-cfg in earlier versions of Megatron-LM.
_OLD_REAL_CONFIGS = {
    "fp8_real_quant": "FP8_DEFAULT_CFG",
    "fp8_blockwise_real_quant": "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG",
}


@dataclass(frozen=True, kw_only=True)
class AutoQuantizeOptions:
    TITLE: ClassVar[str] = "auto: a search for the format of each layer"

    auto_quantize_bits: float = flag(
        4.8,
        metavar="X",
        check=positive,
        help="stored bits per weight of the linear layers, at most (%(default)s)",
    )
    auto_quantize_formats: str = flag(
        "FP8_DEFAULT_CFG,NVFP4_DEFAULT_CFG",
        metavar="A,B",
        help="formats to choose from (%(default)s)",
    )
    auto_quantize_method: str = flag(
        "gradient",
        choices=("gradient", "kl_div"),
        help="how sensitivity is measured (%(default)s)",
    )
    auto_quantize_score_size: int = flag(
        128, metavar="N", check=at_least(1), help="sequences to measure it on (%(default)s)"
    )
    auto_quantize_checkpoint: str | None = flag(
        metavar="FILE", help="keep the measurements here; the rank is added to its name"
    )


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions(StageOptions):
    export_quant_cfg: str | None = flag(metavar="NAME", help=f"format, or auto ({formats.DEFAULT})")
    recipe: str | None = flag(
        metavar="FILE", help="recipe file of ModelOpt, or a built-in one's name"
    )
    export_kv_cache_quant: str = flag(
        NO_KV_CACHE,
        choices=tuple(formats.KV_CACHES),
        help="quantize keys and values too (%(default)s)",
    )
    weight_only: bool = flag(False, help="leave the linear layers' inputs in 16 bits")
    disable_qkv_quant: bool = flag(
        False, help="leave the linears that compute queries, keys and values in 16 bits"
    )
    compress: bool = flag(False, help="pack the weights into their low-bit form")
    export_real_quant_cfg: str | None = flag(
        metavar="NAME", help="the same as --export-quant-cfg NAME --compress"
    )
    sync_expert_weight_amax: bool = flag(
        False, help="give all experts of a layer the same weight scale"
    )
    allow_unexportable: bool = flag(
        False, help="quantize even if no engine would read the export correctly"
    )
    calibration: CalibrationOptions = group(CalibrationOptions)
    auto: AutoQuantizeOptions = group(AutoQuantizeOptions)
    smoke: SmokeOptions = group(SmokeOptions)

    @property
    def real_format(self) -> str | None:
        """The format of ``--export-real-quant-cfg``, if it names one."""
        name = self.export_real_quant_cfg
        return None if name in (None, "None") else _OLD_REAL_CONFIGS.get(str(name), name)

    @property
    def packed(self) -> bool:
        """Whether the weights are saved in their low-bit form."""
        return self.compress or self.real_format is not None


def chosen(options: QuantizeOptions) -> Choice:
    """The format, recipe or ``auto`` that the options name.

    Raises:
        UsageError: for an unknown name, or both a format and a recipe.
    """
    name = options.real_format or options.export_quant_cfg
    if options.recipe:
        if name:
            raise UsageError(
                f"--recipe {options.recipe} with --export-quant-cfg {name}",
                "each says how to quantize",
                "give one of them",
            )
        return recipes.find(options.recipe)
    name = name or formats.DEFAULT
    if name == formats.AUTO:
        return formats.AUTO
    # Megatron-LM's script tells a recipe file from a name by this rule.
    is_recipe = "/" in name or name.endswith((".yaml", ".yml"))
    return recipes.find(name) if is_recipe else formats.find(name)


def is_search(choice: Choice) -> bool:
    """Whether each layer's format is to be searched."""
    return choice == formats.AUTO or (isinstance(choice, Recipe) and choice.kind == "auto_quantize")


def name_of(choice: Choice) -> str:
    """As messages and the manifest call it."""
    if isinstance(choice, Recipe):
        return str(choice.path)
    return choice if isinstance(choice, str) else choice.name


def check(options: QuantizeOptions, choice: Choice, architecture: Architecture | None) -> None:
    """Refuse what cannot be quantized, exported or saved as asked.

    Args:
        choice: from :func:`chosen`.
        architecture: None where it is not known yet.

    Raises:
        UsageError: naming the flag, its value and the reason.
    """
    if options.export_kv_cache_quant == "nvfp4_rotate":
        _require_hadamard("--export-kv-cache-quant nvfp4_rotate")
    if isinstance(choice, Format):
        _check_format(options, choice)
        if architecture is not None:
            _check_layers(options, choice, architecture)
    sizes = options.parallel
    if sizes.expert > 1 and max(sizes.tensor, sizes.expert_tensor) > 1:
        raise UsageError(
            f"TP={sizes.tensor} EP={sizes.expert} ETP={sizes.expert_tensor}",
            "ModelOpt quantizes experts at EP > 1 only where TP and ETP are 1",
            "set TP=1 ETP=1, or EP=1; PP may be larger",
        )
    if choice == formats.AUTO:
        _check_search(options)
    stages = options.parallel.pipeline
    if is_search(choice) and stages > 1:
        raise UsageError(
            f"PP={stages} with {name_of(choice)}",
            "each pipeline stage would search alone",
            "set PP=1; TP may be larger",
        )


def _check_format(options: QuantizeOptions, choice: Format) -> None:
    """Refuse what cannot be exported, or not be saved, before the work."""
    what = f"--export-quant-cfg {options.export_quant_cfg or choice.name}"
    what += " --weight-only" if options.weight_only else ""
    if options.export_kv_cache_quant != NO_KV_CACHE:
        what += f" --export-kv-cache-quant {options.export_kv_cache_quant}"
    if choice.broken:
        raise UsageError(
            what, choice.broken, "choose another format; docs/formats.md has the table"
        )
    if choice.kv == "nvfp4_rotate" and options.allow_unexportable:
        _require_hadamard(what)
    found = exportable.verdict(
        choice, weight_only=options.weight_only, kv_cache=options.export_kv_cache_quant
    )
    if not found.exportable and not options.allow_unexportable:
        raise exportable.unexportable(what, found)
    ranks, replicas = options.parallel.tensor, options.parallel.data
    if ranks > 1 and choice.linear and formats.WEIGHTS[choice.linear.weight].stored_block_scales:
        raise exportable.unsavable(what, ranks)
    if choice.method == GPTQ:
        sizes = options.parallel
        exportable.require_whole_layers(what, ranks, sizes.pipeline, sizes.expert_tensor)
        if options.packed:
            raise UsageError(
                f"{what} --compress",
                "ModelOpt would pack other codes than GPTQ found",
                "leave the flag out; export.sh packs the weights",
            )
        if options.sync_expert_weight_amax:
            raise UsageError(
                f"{what} --sync-expert-weight-amax",
                "GPTQ finds the scales of each expert's blocks while it changes the weights",
                "leave the flag out",
            )
    if choice.method in ("local_hessian", "awq_lite") and replicas > 1:
        raise UsageError(
            f"{what} with DP={replicas}",
            "ModelOpt adds up neither Hessians nor losses of the replicas, whose scales would "
            "differ",
            "set DP=1; PP may be larger",
        )


def _check_layers(options: QuantizeOptions, choice: Format, architecture: Architecture) -> None:
    """Refuse layers that the model lacks, and blocks that do not fit into a rank's rows."""
    what = f"--export-quant-cfg {options.export_quant_cfg or choice.name}"
    values, ranks = architecture.resolved(), options.parallel.tensor
    size = formats.WEIGHTS[choice.linear.weight].block_size if choice.linear else 1
    heads = values["num_attention_heads"] * values["kv_channels"]
    experts = (values["moe_ffn_hidden_size"] or 0) if values["num_moe_experts"] else 0
    inputs = {
        "hidden size": values["hidden_size"],
        "heads x head size": 0 if architecture.multi_latent_attention else heads // ranks,
        "FFN size": values["ffn_hidden_size"] // ranks,
        "experts' FFN size": experts // options.parallel.expert_tensor,
    }
    wrong = [f"{name} {count}" for name, count in inputs.items() if count % size]
    if wrong:
        per_rank = f" (at TP={ranks})" if ranks > 1 else ""
        raise UsageError(
            what,
            f"{size} inputs share a scale, which does not divide {', '.join(wrong)}{per_rank}",
            "choose a format without blocks, such as FP8_DEFAULT_CFG"
            + (", or a smaller TP" if ranks > 1 else ""),
        )
    if not options.allow_unexportable:
        kernels.check(what, choice, values, weight_only=options.weight_only)
    if choice.layers == "experts" and not values["num_moe_experts"]:
        raise UsageError(
            what,
            "it quantizes experts, and the model has none",
            "NVFP4_MLP_ONLY_CFG quantizes the MLP of a dense model",
        )


def _require_hadamard(what: str) -> None:
    if importlib.util.find_spec("fast_hadamard_transform") is None:
        raise UsageError(
            what,
            "ModelOpt rotates with the package fast_hadamard_transform, which is not installed",
            "install it (it needs CUDA), or use fp8 or nvfp4",
        )


def _check_search(options: QuantizeOptions) -> None:
    names, bits = options.auto.auto_quantize_formats, options.auto.auto_quantize_bits
    rows = [formats.find(name, "--auto-quantize-formats") for name in names.split(",")]
    changing = [row.name for row in rows if row.method in (*FOLDED_METHODS, GPTQ)]
    if changing:
        raise UsageError(
            f"--auto-quantize-formats {names}",
            f"{', '.join(changing)} changes norms or weights, and a search compares formats on the "
            "same ones",
            "leave it out, or quantize the whole model in it",
        )
    linears = [row.linear for row in rows if row.linear is not None]
    attention = any(row.attention for row in rows)
    found = exportable.judge(linears, options.export_kv_cache_quant, attention=attention)
    if not found.exportable and not options.allow_unexportable:
        raise exportable.unexportable(f"--auto-quantize-formats {names}", found)
    least = min((formats.WEIGHTS[linear.weight].bits for linear in linears), default=16.0)
    if not least <= bits <= 16:
        raise UsageError(
            f"--auto-quantize-bits {bits}",
            f"these formats need between {least:g} and 16 bits a weight",
            "give a number in between",
        )
