"""Say what this machine can run: ``python -m post_training.doctor``.

Prints a table of versions, devices, memory and disk and, for each problem, the remedy. Exit code 1
if a stage could not run.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from post_training.common import inputs, threads, versions
from post_training.common.quiet import quiet

_NO_APEX = r"(Transformer Engine and )?Apex (is|are) not installed"
_SMALLEST_DISK = 10 * 10**9
_SMALLEST_MEMORY = 4 * 10**9


@dataclass(frozen=True)
class Finding:
    """One line of the table. ``remedy`` is set for a problem; ``fatal`` if stages cannot run."""

    name: str
    value: str
    remedy: str = ""
    fatal: bool = False

    @property
    def mark(self) -> str:
        return "problem" if self.fatal else "note" if self.remedy else "ok"


def examine() -> list[Finding]:
    """Everything found about this machine."""
    findings = [_python(), *map(_package, versions.REQUIREMENTS)]
    installed = not any(finding.fatal for finding in findings)
    if importlib.util.find_spec("torch") is not None:
        findings += _devices()
    # Otherwise the imports would fail with a message that says less.
    if installed:
        # The table says itself that Apex, Transformer Engine or a GPU is missing.
        with quiet("torch.utils.cpp_extension", warning=_NO_APEX):
            findings += _imports()
    sbatch = shutil.which("sbatch") or "not found (submits to SLURM; only needed there)"
    return [*findings, _memory(), _disk(), Finding("sbatch", sbatch)]


def _python() -> Finding:
    running = ".".join(map(str, sys.version_info[:3]))
    for problem in versions.problems():
        if problem.what.startswith("Python "):
            return Finding("Python", f"{running}: {problem.cause}", problem.remedy, fatal=True)
    return Finding("Python", running)


def _package(needed: versions.Requirement) -> Finding:
    version = needed.installed()
    if version is None:
        return Finding(needed.package, "not installed", needed.remedy, fatal=True)
    if not needed.accepts(version):
        text = f"{version}, needed {needed.accepted}: {needed.reason}"
        return Finding(needed.package, text, needed.remedy, fatal=True)
    if version.split("+")[0] != needed.tested:
        version += f" (accepted; measured with {needed.tested})"
    return Finding(needed.package, version)


def _devices() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi"):
            yield Finding(
                "GPU",
                "nvidia-smi is there, but torch sees no GPU",
                "install the torch build for this driver's CUDA; see nvidia-smi's first line",
            )
        else:
            yield Finding("GPU", f"none; stages run on the CPU ({threads.cores()} cores)")
        return
    nccl = "not available"
    if torch.distributed.is_nccl_available():
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
    yield Finding("CUDA", f"{torch.version.cuda}, NCCL {nccl}")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        yield Finding(
            f"GPU {index}",
            f"{properties.name}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free, "
            f"compute capability {properties.major}.{properties.minor}",
        )
    if not shutil.which("nvcc") and not os.environ.get("CUDA_HOME"):
        yield Finding(
            "nvcc",
            "not found: ModelOpt's INT8 and MX kernels are compiled at first use",
            "install the CUDA toolkit and set CUDA_HOME; FP8 and NVFP4 run without it",
        )


def _imports() -> Iterator[Finding]:
    from post_training import portable

    yield Finding("Transformer Engine", str(portable.install()))
    try:
        import modelopt.torch.export
        import modelopt.torch.quantization  # noqa: F401
    except Exception as error:
        remedy = "python -m pip install --force-reinstall -r requirements.txt"
        yield Finding("imports", f"{type(error).__name__}: {error}", remedy, fatal=True)
    else:
        yield Finding("imports", "megatron-core and ModelOpt import")


def _memory() -> Finding:
    page = os.sysconf("SC_PAGE_SIZE")
    available, total = os.sysconf("SC_AVPHYS_PAGES") * page, os.sysconf("SC_PHYS_PAGES") * page
    text = f"{available / 1e9:.0f} of {total / 1e9:.0f} GB free"
    if total < _SMALLEST_MEMORY:
        return Finding("memory", text, "use a machine with 4 GB or more", fatal=True)
    return Finding("memory", text)


def _disk() -> Finding:
    work = inputs.nearest_existing(Path(os.environ.get("MLM_WORK_DIR") or tempfile.gettempdir()))
    usage = shutil.disk_usage(work)
    text = f"{usage.free / 1e9:.0f} of {usage.total / 1e9:.0f} GB free under {work}"
    remedy = "set MLM_WORK_DIR to a folder on a larger disk" if usage.free < _SMALLEST_DISK else ""
    return Finding("disk", text, remedy)


def show(findings: list[Finding]) -> None:
    """Print the table to stdout; plain lines where rich is missing."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        for finding in findings:
            print(f"{finding.mark:8} {finding.name:20} {finding.value}  {finding.remedy}")
        return
    table = Table(title="post_training.doctor", title_justify="left")
    for column in ("", "what", "found", "remedy"):
        table.add_column(column, overflow="fold")
    colours = {"ok": "green", "note": "yellow", "problem": "red"}
    for finding in findings:
        mark = f"[{colours[finding.mark]}]{finding.mark}[/]"
        table.add_row(mark, finding.name, finding.value, finding.remedy)
    Console().print(table)


def main() -> None:
    description = __doc__.split("\n\n")[0]
    argparse.ArgumentParser("python -m post_training.doctor", description=description).parse_args()
    findings = examine()
    show(findings)
    fatal = [finding.name for finding in findings if finding.fatal]
    if fatal:
        print(f"not ready: {', '.join(fatal)}")
        sys.exit(1)
    print("ready: every stage can run")
