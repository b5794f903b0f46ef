"""The package versions that work together, and the check that every stage makes at its start.

Nothing here imports torch: versions are read from the installed packages' metadata.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib import metadata

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from post_training.common.errors import UsageError


@dataclass(frozen=True)
class Requirement:
    """One package: the version measured, the range that is accepted, and why the range ends."""

    package: str
    tested: str
    accepted: str
    reason: str

    def installed(self) -> str | None:
        """The installed version, or None."""
        try:
            return metadata.version(self.package)
        except metadata.PackageNotFoundError:
            return None

    def accepts(self, version: str) -> bool:
        """Whether ``version`` (local part ignored, e.g. ``+cu130``) lies in the accepted range."""
        return Version(Version(version).public) in SpecifierSet(self.accepted, prereleases=True)

    @property
    def remedy(self) -> str:
        return f"python -m pip install '{self.package}=={self.tested}'"


PYTHON = ">=3.12,<3.14"
REQUIREMENTS = (
    Requirement("torch", "2.11.0", ">=2.11,<2.13", "measured with 2.11"),
    Requirement(
        "megatron-core", "0.19.2", ">=0.19.2,<0.20", "ModelOpt's exporter needs its HybridModel"
    ),
    Requirement(
        "nvidia-modelopt", "0.47.0", ">=0.47,<0.48", "its exporter is extended by subclassing"
    ),
    Requirement("transformers", "5.14.1", ">=5.14,<5.15", "ModelOpt 0.47 requires < 5.15"),
    Requirement("datasets", "5.2.0", ">=4", "measured with 5.2"),
    Requirement("safetensors", "0.8.0", ">=0.5", "measured with 0.8"),
    Requirement("requests", "2.34.2", ">=2", "ModelOpt imports it without declaring it"),
)


def problems() -> list[UsageError]:
    """Everything about Python and the packages that keeps a stage from running."""
    found = []
    running = ".".join(map(str, sys.version_info[:3]))
    if Version(running) not in SpecifierSet(PYTHON):
        cause = f"{PYTHON} is needed: megatron-core 0.19 has no wheels for others"
        remedy = "make an environment with Python 3.12: bash quickstart.sh does"
        found.append(UsageError(f"Python {running}", cause, remedy))
    for each in REQUIREMENTS:
        version = each.installed()
        needed = f"{each.accepted} is needed"
        if version is None:
            found.append(UsageError(f"{each.package} is not installed", needed, each.remedy))
        elif not each.accepts(version):
            cause = f"{needed}: {each.reason}"
            found.append(UsageError(f"{each.package} {version}", cause, each.remedy))
    return found


def check() -> None:
    """Raise UsageError that lists every problem of :func:`problems`, if there is one."""
    found = problems()
    if found:
        raise UsageError(
            "this Python environment: " + "; ".join(p.what for p in found),
            "; ".join(p.cause for p in found),
            "; ".join(dict.fromkeys(p.remedy for p in found))
            + " (python -m post_training.doctor shows everything)",
        )
