"""What the command line says about quantization, checked without torch.

A name of the table, a recipe file, or ``auto``; and whether the result could be exported and saved.
"""

from __future__ import annotations

import argparse
import importlib.util

from post_training.common.errors import UsageError
from post_training.config import arguments
from post_training.models.architecture import Architecture
from post_training.quantization import formats, recipes
from post_training.quantization.formats import Format
from post_training.quantization.recipes import Recipe

Choice = Format | Recipe | str
# Values of --export-real-quant-cfg in earlier versions of Megatron-LM.
_OLD_REAL_CONFIGS = {
    "fp8_real_quant": "FP8_DEFAULT_CFG",
    "fp8_blockwise_real_quant": "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG",
}


def chosen(args: argparse.Namespace) -> Choice:
    """The format, recipe or ``auto`` that the arguments name.

    Raises:
        UsageError: for an unknown name, or both a format and a recipe.
    """
    name = args.export_quant_cfg
    if args.export_real_quant_cfg not in (None, "None"):
        name = _OLD_REAL_CONFIGS.get(args.export_real_quant_cfg, args.export_real_quant_cfg)
        args.compress = True
    if args.recipe:
        if name:
            raise UsageError(
                f"--recipe {args.recipe} with --export-quant-cfg {name}",
                "each says how to quantize",
                "give one of them",
            )
        return recipes.find(args.recipe)
    name = name or formats.DEFAULT
    if name == formats.AUTO:
        return formats.AUTO
    return recipes.find(name) if formats.is_recipe(name) else formats.find(name)


def is_search(choice: Choice) -> bool:
    """Whether each layer's format is to be searched."""
    return isinstance(choice, str) or (
        isinstance(choice, Recipe) and choice.kind == "auto_quantize"
    )


def name_of(choice: Choice) -> str:
    """As messages and the manifest call it."""
    if isinstance(choice, Recipe):
        return str(choice.path)
    return choice if isinstance(choice, str) else choice.name


def check(args: argparse.Namespace, architecture: Architecture | None) -> None:
    """Refuse what cannot be quantized, exported or saved as asked.

    Args:
        architecture: None where it is not known yet.

    Raises:
        UsageError: naming the flag, its value and the reason.
    """
    choice = chosen(args)
    if args.export_kv_cache_quant == "nvfp4_rotate":
        _require_hadamard("--export-kv-cache-quant nvfp4_rotate")
    if isinstance(choice, Format):
        _check_format(args, choice)
        if architecture is not None:
            _check_blocks(args, choice, architecture)
        experts = architecture is None or architecture.value("num_moe_experts")
        if choice.layers == "experts" and not experts:
            raise UsageError(
                f"--export-quant-cfg {args.export_quant_cfg}",
                "it quantizes experts, and the model has none",
                "NVFP4_MLP_ONLY_CFG quantizes the MLP of a dense model",
            )
    if choice == formats.AUTO:
        _check_search(args)
    stages = arguments.parallel(args).pipeline
    if is_search(choice) and stages > 1:
        raise UsageError(
            f"PP={stages} with {name_of(choice)}",
            "each pipeline stage would search alone",
            "set PP=1; TP may be larger",
        )


def _check_format(args: argparse.Namespace, choice: Format) -> None:
    """Refuse what cannot be exported, or not be saved, before the work."""
    found = formats.verdict(
        choice, weight_only=args.weight_only, kv_cache=args.export_kv_cache_quant
    )
    what = f"--export-quant-cfg {args.export_quant_cfg or choice.name}"
    what += " --weight-only" if args.weight_only else ""
    if args.export_kv_cache_quant != "none":
        what += f" --export-kv-cache-quant {args.export_kv_cache_quant}"
    if choice.broken:
        raise UsageError(what, choice.broken, "choose another format; README.md has the table")
    if choice.kv == "nvfp4_rotate" and args.allow_unexportable:
        _require_hadamard(what)
    if not found.exportable and not args.allow_unexportable:
        raise formats.unexportable(what, found)
    weight = choice.linear.weight if choice.linear else ""
    if args.tensor_model_parallel_size > 1 and weight in formats.STATIC_BLOCKS:
        raise UsageError(
            f"{what} with TP={args.tensor_model_parallel_size}",
            "ModelOpt cannot save stored block scales that are split over ranks",
            "set TP=1; PP may be larger",
        )
    copies = arguments.parallel(args).data
    if choice.method == "local_hessian" and copies > 1:
        raise UsageError(
            f"{what} with {copies} copies of the model (DP)",
            "ModelOpt does not sum the Hessians of the copies, and their scales would differ",
            "set DP=1; PP may be larger",
        )


def _check_blocks(args: argparse.Namespace, choice: Format, architecture: Architecture) -> None:
    """Refuse blocks that do not fit into a row of a weight as one rank holds it."""
    size = formats.BLOCK_SIZES.get(choice.linear.weight if choice.linear else "", 1)
    values, ranks = architecture.resolved(), args.tensor_model_parallel_size
    ranks_of_expert = args.expert_tensor_parallel_size or ranks
    heads = values["num_attention_heads"] * values["kv_channels"]
    inputs = {
        "hidden size": values["hidden_size"],
        "heads x head size": 0 if architecture.multi_latent_attention else heads // ranks,
        "FFN size": values["ffn_hidden_size"] // ranks,
        "experts' FFN size": (values["moe_ffn_hidden_size"] or 0) // ranks_of_expert
        if values["num_moe_experts"]
        else 0,
    }
    wrong = [f"{name} {count}" for name, count in inputs.items() if count % size]
    if wrong:
        per_rank = f" (at TP={ranks})" if ranks > 1 else ""
        raise UsageError(
            f"--export-quant-cfg {args.export_quant_cfg or choice.name}",
            f"{size} inputs share a scale, which does not divide {', '.join(wrong)}{per_rank}",
            "choose a format without blocks, such as FP8_DEFAULT_CFG"
            + (", or a smaller TP" if ranks > 1 else ""),
        )


def _require_hadamard(what: str) -> None:
    if importlib.util.find_spec("fast_hadamard_transform") is None:
        raise UsageError(
            what,
            "ModelOpt rotates with the package fast_hadamard_transform, which is not installed",
            "install it (it needs CUDA), or use fp8 or nvfp4",
        )


def _check_search(args: argparse.Namespace) -> None:
    rows = [
        formats.find(name, "--auto-quantize-formats")
        for name in args.auto_quantize_formats.split(",")
    ]
    linears = [row.linear for row in rows if row.linear is not None]
    kv = formats.KV_CACHE[args.export_kv_cache_quant][1]
    found = formats.judge(linears, kv, attention=any(row.attention for row in rows))
    if not found.exportable and not args.allow_unexportable:
        raise formats.unexportable(f"--auto-quantize-formats {args.auto_quantize_formats}", found)
    least = min((formats.WEIGHT_BITS[linear.weight] for linear in linears), default=16.0)
    if not least <= args.auto_quantize_bits <= 16:
        raise UsageError(
            f"--auto-quantize-bits {args.auto_quantize_bits}",
            f"these formats need between {least:g} and 16 bits a weight",
            "give a number in between",
        )
