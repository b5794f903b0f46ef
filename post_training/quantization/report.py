"""What quantize records in the manifest and prints at its end."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from post_training.common import report
from post_training.quantization import options as quantization_choice
from post_training.quantization import quantizers
from post_training.quantization.engines import registry as engines
from post_training.quantization.formats import Verdict

if TYPE_CHECKING:
    from post_training.distributed.session import Session
    from post_training.quantization.calibration import Calibration
    from post_training.quantization.coverage_report import Coverage


def metrics(run: Calibration, reached: Coverage, search: dict[str, Any] | None) -> dict[str, Any]:
    """The manifest's metrics: data really used, and what was quantized."""
    found: dict[str, Any] = {"calibration": run.to_json(), "coverage": reached.to_json()}
    return found if search is None else {**found, "search": search}


def described(
    args: argparse.Namespace,
    choice: quantization_choice.Choice,
    found: Verdict,
    config: dict[str, Any],
) -> dict[str, Any]:
    """What later stages read: the format and whether it can be exported."""
    return {
        "format": quantization_choice.name_of(choice),
        "weight_only": args.weight_only,
        "compressed": args.compress,
        "exportable": found.exportable,
        "quant_algo": found.quant_algo,
        "kv_cache_quant_algo": found.kv_cache_quant_algo,
        "reason": found.reason,
        "configuration": quantizers.as_json(config),
    }


def show(
    args: argparse.Namespace,
    content: dict[str, Any],
    reached: Coverage,
    found: Verdict,
    session: Session,
) -> None:
    """Print the summary."""
    used = content["metrics"]["calibration"]
    of_quantized, of_all = reached.bits_per_weight(32 if args.fp32 else 16)
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
            "checkpoint": f"{args.save} ({report.size(Path(args.save))})",
            "layout saved": report.layout(session.parallel) + ", loads at any",
            **report.cost(content),
        },
        next_step=f"MLM_MODEL_CKPT={args.save} bash mmlu.sh <conf>, then bash export.sh <conf>",
    )
