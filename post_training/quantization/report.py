"""What quantize records in the manifest and prints at its end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from post_training.common import report
from post_training.quantization import quantizers
from post_training.quantization.engines import registry as engines
from post_training.quantization.options import Choice, QuantizeOptions, name_of

if TYPE_CHECKING:
    from post_training.quantization.calibration import Calibration
    from post_training.quantization.ptq import PtqResult


def metrics(data: Calibration, result: PtqResult) -> dict[str, Any]:
    """The manifest's metrics: data really used, and what was quantized."""
    found = {"calibration": data.to_json(), "coverage": result.reached.to_json()}
    return found if result.search is None else {**found, "search": result.search}


def described(options: QuantizeOptions, choice: Choice, result: PtqResult) -> dict[str, Any]:
    """What later stages read: the format and whether it can be exported."""
    found = result.found
    return {
        "format": name_of(choice),
        "weight_only": options.weight_only,
        "compressed": options.packed,
        "exportable": found.exportable,
        "quant_algo": found.quant_algo,
        "kv_cache_quant_algo": found.kv_cache_quant_algo,
        "reason": found.reason,
        "configuration": quantizers.as_json(result.config),
    }


def show(
    options: QuantizeOptions, save: Path, content: Mapping[str, Any], result: PtqResult
) -> None:
    """Print the summary; ``content`` is that of ``run.json``."""
    reached, found = result.reached, result.found
    used = content["metrics"]["calibration"]
    of_quantized, of_all = reached.bits_per_weight(32 if options.precision == "fp32" else 16)
    speed = f", {used['tokens_per_second']:,.0f} tokens/s" if used["tokens_computed"] else ""
    readers, gpus = engines.describe(found.quant_algo)
    exported = f"{found.quant_algo}: {readers}; {gpus}" if found.exportable else "no engine"
    kv = found.kv_cache_quant_algo
    report.summary(
        f"quantized: {content['quantization']['format']}",
        {
            "quantizers": ", ".join(f"{n} {kind}" for kind, n in reached.quantizers.items()),
            "quantized": reached.describe_quantized(),
            "left out": reached.describe_left_out(),
            "bits per weight": f"{of_quantized:.2f} where quantized, {of_all:.2f} over all, "
            "scales included",
            "calibrated on": f"{used['sequences']:,} sequences of {used['sequence_length']:,}, "
            f"{used['tokens']:,} tokens{speed}",
            "exports as": exported + (f"; keys and values {kv}" if kv else ""),
            "checkpoint": f"{save} ({report.size(save)})",
            "layout saved": f"{options.parallel}, loads at any",
            **report.cost(content),
        },
        next_step=f"MLM_MODEL_CKPT={save} bash mmlu.sh <conf>, then bash export.sh <conf>",
    )
