"""The summary of an export. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from post_training.common import report
from post_training.drafts import report as draft_report
from post_training.drafts.record import SUBFOLDER
from post_training.export import target as export_target
from post_training.export.exporting import ExportPlan


def rows(plan: ExportPlan, content: Mapping[str, Any]) -> dict[str, str]:
    """What was written, by name; ``content`` is that of its ``run.json``."""
    metrics = content["metrics"]
    found: dict[str, str] = {}
    if plan.writes_model:
        plain = "rounded, in 16 bits, to be simulated" if plan.simulated else "not quantized"
        found |= {
            "format": metrics["quant_algo"] or plain,
            "KV cache": metrics["kv_cache_quant_algo"] or "not quantized",
            "bits per weight": f"{metrics['bits_per_weight']:.2f}, scales included",
            "read back": f"{metrics['tensors_compared']} tensors equal the model's",
        }
    draft = _draft(plan, metrics)
    if draft:
        found |= draft_report.exported(draft, _draft_folder(plan))
    if "draft_left_out" in metrics:
        found["draft"] = f"NOT WRITTEN: {metrics['draft_left_out']}"
    found["folder"] = f"{plan.folder} ({report.size(plan.folder)})"
    return found


def serve(plan: ExportPlan, content: Mapping[str, Any]) -> str:
    """The command that serves the folder."""
    target = str(plan.folder) if plan.writes_model else "<exported target>"
    program = export_target.server(content["target"], simulated=plan.simulated)
    served = ""
    if _draft(plan, content["metrics"]):
        served = draft_report.served(_draft_folder(plan), content["target"])
    return f"{program} {target}{served}"


def show(plan: ExportPlan, content: Mapping[str, Any]) -> None:
    """Print what was written, and how to serve it."""
    found = {**rows(plan, content), **report.cost(content)}
    report.summary("exported and verified", found, serve(plan, content))


def _draft(plan: ExportPlan, metrics: Mapping[str, Any]) -> Any:
    return metrics.get("draft") if plan.writes_model else metrics


def _draft_folder(plan: ExportPlan) -> Path:
    return plan.folder / SUBFOLDER if plan.writes_model else plan.folder
