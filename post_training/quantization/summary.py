"""The summary of a quantization. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from post_training.quantization import expert_table
from post_training.quantization.engines import registry as engines
from post_training.quantization.options import QuantizeOptions

if TYPE_CHECKING:
    from post_training.quantization.ptq import PtqResult


def rows(options: QuantizeOptions, result: PtqResult, content: Mapping[str, Any]) -> dict[str, str]:
    """What was done, by name; ``content`` is that of the output's ``run.json``."""
    from post_training.quantization import gptq

    reached, found = result.reached, result.found
    used = content["metrics"]["calibration"]
    of_quantized, of_all = reached.bits_per_weight(32 if options.precision == "fp32" else 16)
    speed = f", {used['tokens_per_second']:,.0f} tokens/s" if used["tokens_computed"] else ""
    readers, gpus = engines.describe(found.quant_algo)
    exported = f"{found.quant_algo}: {readers}; {gpus}" if found.exportable else "no engine"
    kv = found.kv_cache_quant_algo
    routed = {"experts": expert_table.describe(used)} if used["expert_tokens"] else {}
    return {
        "quantizers": ", ".join(f"{n} {kind}" for kind, n in reached.quantizers.items()),
        "quantized": reached.describe_quantized(),
        "left out": reached.describe_left_out(),
        "bits per weight": f"{of_quantized:.2f} where quantized, {of_all:.2f} over all, "
        "scales included",
        "calibrated on": f"{used['sequences']:,} sequences of {used['sequence_length']:,}, "
        f"{used['tokens']:,} tokens{speed}, {used['sequences_at_a_time']} at a time",
        **routed,
        **({"gptq": gptq.describe(used["gptq"])} if "gptq" in used else {}),
        "exports as": exported + (f"; keys and values {kv}" if kv else ""),
    }
