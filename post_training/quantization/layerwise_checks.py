"""What ``--layerwise`` cannot do, refused before the work. No torch."""

from __future__ import annotations

from post_training.common.errors import UsageError
from post_training.quantization.options import Choice, QuantizeOptions, is_search

_WHOLE = "leave --layerwise out where the model fits into memory"


def check(options: QuantizeOptions, choice: Choice) -> None:
    """Raise UsageError for what needs the whole model, or writes another thing than an export."""
    sizes = options.parallel
    # By what the command line says: why not, and what to do instead.
    refused = {
        "without --export-dir": (
            not options.export_dir,
            "it writes an exported folder, and none is named",
            "give --export-dir (EXPORT_DIR)",
        ),
        f"with --save {options.save}": (
            bool(options.save),
            "it writes no Megatron checkpoint",
            f"give --export-dir alone (EXPORT_DIR without MLM_MODEL_SAVE), or {_WHOLE}",
        ),
        "with --compress": (
            options.packed,
            "packed weights are for a checkpoint; an export has them packed without it",
            "leave --compress out",
        ),
        f"with PP={sizes.pipeline}": (
            sizes.pipeline > 1,
            "each rank has one layer at a time, and no part of the model for longer",
            "set PP=1: further GPUs share the calibration data (DP)",
        ),
    }
    for what, (is_so, cause, remedy) in refused.items():
        if is_so:
            raise UsageError(f"--layerwise {what}", cause, remedy)
    if is_search(choice):
        raise UsageError(
            "--layerwise with a search of formats",
            "it compares losses of the whole model",
            f"choose one format, or {_WHOLE}",
        )


def noting[Options: QuantizeOptions](options: Options) -> Options:
    """``options`` with what is left out."""
    if options.smoke.skip_generate:
        return options
    return options.noting("--layerwise: no smoke generation, the model is never whole in memory")
