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
from dataclasses import dataclass
from pathlib import Path

from post_training.common import threads, versions
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
    findings = [_python(), *_packages()]
    installed = not any(finding.fatal for finding in findings)
    if importlib.util.find_spec("torch") is not None:
        findings += _devices()
    # Otherwise the imports would fail with a message that says less.
    if installed:
        # The table says itself that Apex, Transformer Engine or a GPU is missing.
        with quiet("torch.utils.cpp_extension", warning=_NO_APEX):
            findings += [_transformer_engine(), _stages_import()]
    return [*findings, _memory(), _disk(), _slurm()]


def _python() -> Finding:
    running = ".".join(map(str, sys.version_info[:3]))
    wrong = [problem for problem in versions.problems() if problem.what.startswith("Python ")]
    if wrong:
        return Finding("Python", f"{running}: {wrong[0].cause}", wrong[0].remedy, fatal=True)
    return Finding("Python", running)


def _packages() -> list[Finding]:
    findings = []
    for requirement in versions.REQUIREMENTS:
        version = requirement.installed()
        if version is None:
            finding = Finding(requirement.package, "not installed", requirement.remedy, fatal=True)
        elif not requirement.accepts(version):
            text = f"{version}, needed {requirement.accepted}: {requirement.reason}"
            finding = Finding(requirement.package, text, requirement.remedy, fatal=True)
        elif version.split("+")[0] != requirement.tested:
            text = f"{version} (accepted; measured with {requirement.tested})"
            finding = Finding(requirement.package, text)
        else:
            finding = Finding(requirement.package, version)
        findings.append(finding)
    return findings


def _devices() -> list[Finding]:
    import torch

    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi"):
            return [
                Finding(
                    "GPU",
                    "nvidia-smi is there, but torch sees no GPU",
                    "install the torch build for this driver's CUDA; see nvidia-smi's first line",
                )
            ]
        return [Finding("GPU", f"none; stages run on the CPU ({threads.cores()} cores)")]
    findings = [Finding("CUDA", f"{torch.version.cuda}, NCCL {_nccl()}")]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        findings.append(
            Finding(
                f"GPU {index}",
                f"{properties.name}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free, "
                f"compute capability {properties.major}.{properties.minor}",
            )
        )
    if not shutil.which("nvcc") and not os.environ.get("CUDA_HOME"):
        findings.append(
            Finding(
                "nvcc",
                "not found: ModelOpt's INT8 and MX kernels are compiled at first use",
                "install the CUDA toolkit and set CUDA_HOME; FP8 and NVFP4 run without it",
            )
        )
    return findings


def _nccl() -> str:
    import torch

    if not torch.distributed.is_nccl_available():
        return "not available"
    return ".".join(map(str, torch.cuda.nccl.version()))


def _transformer_engine() -> Finding:
    from post_training import portable

    return Finding("Transformer Engine", str(portable.install()))


def _stages_import() -> Finding:
    try:
        import modelopt.torch.export
        import modelopt.torch.quantization  # noqa: F401
    except Exception as error:
        return Finding(
            "imports",
            f"{type(error).__name__}: {error}",
            "python -m pip install --force-reinstall -r requirements.txt",
            fatal=True,
        )
    return Finding("imports", "megatron-core and ModelOpt import")


def _memory() -> Finding:
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    text = f"{available / 1e9:.0f} of {total / 1e9:.0f} GB free"
    if total < _SMALLEST_MEMORY:
        return Finding("memory", text, "use a machine with 4 GB or more", fatal=True)
    return Finding("memory", text)


def _disk() -> Finding:
    work = Path(os.environ.get("MLM_WORK_DIR") or tempfile.gettempdir())
    while not work.exists():
        work = work.parent
    usage = shutil.disk_usage(work)
    text = f"{usage.free / 1e9:.0f} of {usage.total / 1e9:.0f} GB free under {work}"
    if usage.free < _SMALLEST_DISK:
        return Finding("disk", text, "set MLM_WORK_DIR to a folder on a larger disk")
    return Finding("disk", text)


def _slurm() -> Finding:
    found = shutil.which("sbatch")
    return Finding("sbatch", found or "not found (submits to SLURM; only needed there)")


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
