"""The summary of an export. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from post_training.common import report
from post_training.drafts import report as draft_report
from post_training.drafts.record import SUBFOLDER

# By --target.
_SERVE = {
    "vllm": "vllm serve",
    "sglang": "python -m sglang.launch_server --model-path",
    "trtllm": "trtllm-serve",
}


def server(target: str, *, simulated: bool) -> str:
    """The command that the model's folder is appended to."""
    return "vllm_serve_fakequant.py" if simulated else _SERVE[target]


def show(folder: Path, content: Mapping[str, Any], *, has_model: bool, simulated: bool) -> None:
    """Print what was written to ``folder``, and how to serve it.

    Args:
        content: of its ``run.json``.
        has_model: it is not a draft alone.
        simulated: its weights are rounded, and stored in 16 bits.
    """
    metrics = content["metrics"]
    rows: dict[str, str] = {}
    target, served = "<exported target>", ""
    if has_model:
        target = str(folder)
        plain = "rounded, in 16 bits, to be simulated" if simulated else "not quantized"
        rows |= {
            "format": metrics["quant_algo"] or plain,
            "KV cache": metrics["kv_cache_quant_algo"] or "not quantized",
            "bits per weight": f"{metrics['bits_per_weight']:.2f}, scales included",
            "read back": f"{metrics['tensors_compared']} tensors equal the model's",
        }
    draft = metrics.get("draft") if has_model else metrics
    if draft:
        place = folder / SUBFOLDER if has_model else folder
        rows |= draft_report.exported(draft, place)
        served = draft_report.served(place, content["target"])
    if "draft_left_out" in metrics:
        rows["draft"] = f"NOT WRITTEN: {metrics['draft_left_out']}"
    rows["folder"] = f"{folder} ({report.size(folder)})"
    next_step = f"{server(content['target'], simulated=simulated)} {target}{served}"
    report.summary("exported and verified", {**rows, **report.cost(content)}, next_step)
