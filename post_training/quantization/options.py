"""What the command line says about quantization, checked without torch.

A name of the table, a recipe file, or ``auto``; and whether the result could be exported and saved.
"""

from __future__ import annotations

from dataclasses import dataclass

from post_training.common.errors import UsageError
from post_training.config.export_folder import FolderOptions
from post_training.config.flags import flag, group, spelled
from post_training.config.options import StageOptions
from post_training.data.options import CalibrationOptions
from post_training.inference.smoke_generation import SmokeOptions
from post_training.models.architecture import Architecture
from post_training.quantization import (
    format_checks,
    kernels,
    layer_names,
    model_checks,
    recipes,
    search_options,
)
from post_training.quantization.engines import registry as engines
from post_training.quantization.expert_options import ExpertOptions
from post_training.quantization.formats import exportable
from post_training.quantization.formats import registry as formats
from post_training.quantization.formats.base import NO_KV_CACHE, Format
from post_training.quantization.recipes import Recipe
from post_training.quantization.search_options import AutoQuantizeOptions

Choice = Format | Recipe | str
# Values of --export-real-quant-cfg in earlier versions of Megatron-LM.
_OLD_REAL_CONFIGS = {
    "fp8_real_quant": "FP8_DEFAULT_CFG",
    "fp8_blockwise_real_quant": "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG",
}


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions(FolderOptions, StageOptions):
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
    leave_out: tuple[str, ...] = flag(
        (),
        metavar="PATTERN",
        action="extend",
        help="leave linear layers in 16 bits by name, such as decoder.layers.0.* or *down_proj",
    )
    compress: bool = flag(False, help="pack the weights into their low-bit form")
    export_real_quant_cfg: str | None = flag(
        metavar="NAME", help="the same as --export-quant-cfg NAME --compress"
    )
    target: str = flag(
        engines.DEFAULT,
        choices=tuple(engines.TARGETS),
        help="engine that the export is for (%(default)s)",
    )
    allow_unexportable: bool = flag(
        False, help="quantize even if the engine would not read the export correctly"
    )
    layerwise: bool = flag(False, help="one layer at a time, for models larger than memory")
    calibration: CalibrationOptions = group(CalibrationOptions)
    experts: ExpertOptions = group(ExpertOptions)
    auto: AutoQuantizeOptions = group(AutoQuantizeOptions)
    smoke: SmokeOptions = group(SmokeOptions)

    @property
    def real_format(self) -> str | None:
        """The format of ``--export-real-quant-cfg``, if it names one."""
        name = self.export_real_quant_cfg
        return None if name in (None, "None") else _OLD_REAL_CONFIGS.get(str(name), name)

    @property
    def asked_to_leave_out(self) -> tuple[str, ...]:
        """Patterns of ``--leave-out``, with Megatron's names."""
        return tuple(dict.fromkeys(map(layer_names.translated, self.leave_out)))

    @property
    def left_out(self) -> tuple[str, ...]:
        """Patterns of all linears that flags leave in 16 bits."""
        return (*self.asked_to_leave_out, *(layer_names.QKV if self.disable_qkv_quant else ()))

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
    bits = options.given.get("auto_quantize_bits")
    if options.recipe:
        if name or bits:
            other = f"--export-quant-cfg {name}" if name else f"--auto-quantize-bits {bits}"
            raise UsageError(
                f"--recipe {options.recipe} with {other}",
                "each says how to quantize",
                "give one of them",
            )
        return recipes.find(options.recipe)
    name = name or formats.DEFAULT
    if name in formats.AUTO_NAMES or bits:
        return formats.AUTO
    # Megatron-LM's script tells a recipe file from a name by this rule.
    is_recipe = "/" in name or name.endswith((".yaml", ".yml"))
    return recipes.find(name) if is_recipe else formats.find(name)


def noting[Options: QuantizeOptions](options: Options, choice: Choice) -> Options:
    """``options`` with what there is to say about flags of the search that are given."""
    auto, name = options.auto, options.export_quant_cfg
    given = [spelled(n) for n in options.given if n.startswith("auto_quantize_")]
    if options.asked_to_leave_out != options.leave_out:
        options = options.noting(layer_names.note(options.asked_to_leave_out))
    if choice != formats.AUTO:
        unused = ", ".join(each for each in given if each != "--auto-quantize-checkpoint")
        said = f"unused without auto or --auto-quantize-bits: {unused}"
        return options.noting(said) if unused and not is_search(choice) else options
    if name and name not in formats.AUTO_NAMES:
        options = options.noting(
            f"--auto-quantize-bits {auto.auto_quantize_bits:g} asks for a search of each layer's "
            f"format: --export-quant-cfg {name} is not used"
        )
    if auto.bits != auto.auto_quantize_bits:
        options = options.noting(
            f"--auto-quantize-bits {auto.auto_quantize_bits:g} leaves no room for scales: taken "
            f"as {auto.bits:g}, the smallest format's bits with its scales"
        )
    return options


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
        architecture: None where it is not known yet.

    Raises:
        UsageError: naming the flag, its value and the reason.
    """
    if options.export_kv_cache_quant == "nvfp4_rotate":
        format_checks.require_hadamard("--export-kv-cache-quant nvfp4_rotate")
    if architecture is not None:
        in_format, method = NO_KV_CACHE, ""
        if isinstance(choice, Format):
            in_format, method = choice.kv, choice.method
        named = [choice] if isinstance(choice, Format) else options.auto.formats
        weights = [each.linear.weight for each in named if each.linear]
        asked, what = options.export_kv_cache_quant, f"--export-quant-cfg {name_of(choice)}"
        kv_caches = {f"--export-kv-cache-quant {asked}": asked, what: in_format}
        used = None if isinstance(choice, Recipe) else weights
        allowed = options.allow_unexportable
        model_checks.check(architecture, what, kv_caches, allowed, method=method, weights=used)
        for each in named:
            model_checks.check_clipping(what, each.method, architecture.value("num_moe_experts"))
    if isinstance(choice, Format):
        _check_format(options, choice, architecture)
    sizes, stages = options.parallel, options.parallel.pipeline
    if sizes.expert > 1 and max(sizes.tensor, sizes.expert_tensor) > 1:
        raise UsageError(
            f"TP={sizes.tensor} EP={sizes.expert} ETP={sizes.expert_tensor}",
            "ModelOpt quantizes experts at EP > 1 only where TP and ETP are 1",
            "set TP=1 ETP=1, or EP=1; PP may be larger",
        )
    if choice == formats.AUTO:
        _check_search(options, architecture)
    if is_search(choice) and stages > 1:
        raise UsageError(
            f"PP={stages} with {name_of(choice)}",
            "each pipeline stage would search alone",
            "set PP=1; TP may be larger",
        )


def _check_format(
    options: QuantizeOptions, choice: Format, architecture: Architecture | None
) -> None:
    """Refuse what cannot be exported, or not be saved, before the work."""
    what = f"--export-quant-cfg {options.export_quant_cfg or choice.name}"
    what += " --weight-only" if options.weight_only else ""
    what += f" --target {options.target}" if options.target != engines.DEFAULT else ""
    with_cache = what
    if options.export_kv_cache_quant != NO_KV_CACHE:
        with_cache += f" --export-kv-cache-quant {options.export_kv_cache_quant}"
    _check_runs(options, choice, with_cache)
    found = _verdict(options, choice)
    if not found.exportable and not options.allow_unexportable:
        raise exportable.unexportable(with_cache, found)
    if architecture is not None:
        _check_layers(options, choice, what, architecture)


def _check_runs(options: QuantizeOptions, choice: Format, what: str) -> None:
    format_checks.check(
        choice,
        what,
        options.parallel,
        packed=options.packed,
        synced=options.experts.sync_expert_weight_amax,
        allow_unexportable=options.allow_unexportable,
    )


def _verdict(options: QuantizeOptions, choice: Format) -> exportable.Verdict:
    return exportable.verdict(
        choice,
        weight_only=options.weight_only,
        kv_cache=options.export_kv_cache_quant,
        target=options.target,
    )


def _check_layers(
    options: QuantizeOptions, choice: Format, what: str, architecture: Architecture
) -> None:
    """Refuse layers that the model lacks, blocks that do not fit into a rank's rows, and sizes that
    an engine's kernels do not take."""
    values, left_out = architecture.resolved(), options.left_out
    kernels.check_names(options.asked_to_leave_out, architecture)
    size = formats.WEIGHTS[choice.linear.weight].block_size if choice.linear else 1
    kernels.check_blocks(what, size, values, options.parallel, left_out=left_out)
    if not options.allow_unexportable:
        algorithm = _verdict(options, choice).quant_algo
        kernels.check(what, algorithm, values, options.target, left_out=left_out)
    if choice.layers == "experts" and not values["num_moe_experts"]:
        raise UsageError(
            what,
            "it quantizes experts, and the model has none",
            "NVFP4_MLP_ONLY_CFG quantizes the MLP of a dense model",
        )


def _check_search(options: QuantizeOptions, architecture: Architecture | None) -> None:
    what = f"--auto-quantize-formats {','.join(options.auto.auto_quantize_formats)}"
    what += " --weight-only" if options.weight_only else ""
    for row in options.auto.formats:
        _check_runs(options, row, what)
    found = search_options.check(
        options.auto,
        what,
        kv_cache=options.export_kv_cache_quant,
        weight_only=options.weight_only,
        target=options.target,
        allow_unexportable=options.allow_unexportable,
    )
    if architecture is None:
        return
    for row in options.auto.formats:
        _check_layers(options, row, what, architecture)
    if found.exportable and not options.allow_unexportable:
        values, left_out = architecture.resolved(), options.left_out
        kernels.check(what, found.quant_algo, values, options.target, left_out=left_out)
