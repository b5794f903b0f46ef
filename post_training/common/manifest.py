"""``run.json``: what made an output, from what, and what it contains.

Every stage writes one beside its output; the next stage reads it. A manifest holds the stage, the
command, the resolved configuration (the model's architecture included), package versions, the git
commit, the inputs with their own manifests' hashes, the outputs with sizes and hashes, metrics,
warnings, duration, peak memory and, since format 2, a hash of itself. Nothing here imports torch.

    python -m post_training.manifest valid OUTPUT INPUT [COMMAND...]
    python -m post_training.manifest quote WORDS...

``valid`` exits with code 0 if OUTPUT's files have the hashes recorded and it was made from INPUT
and the other recorded inputs (data, recipes, tokenizers) as they are now, by the versions that are
installed now and, where the words of a COMMAND are given, by that very command. Recorded inputs
that are gone cannot be compared; they are named on standard error. ``quote`` prints a command line
for a shell, with secrets hidden.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, TypedDict

import xxhash

from post_training.common import files, forms, kept_warnings, redaction, regular
from post_training.common.errors import UsageError

FILE = "run.json"
FORMAT = 2
_SEAL = "content_xxh3_128"  # of everything else in the file
_PACKAGES = (
    "torch",
    "megatron-core",
    "nvidia-modelopt",
    "transformers",
    "datasets",
    "accelerate",
    "safetensors",
    "transformer-engine",
)


class _Input(TypedDict):
    role: str
    path: str


class _Output(TypedDict):
    file: str
    bytes: int


class _Quantization(TypedDict, total=False):
    format: str
    quant_algo: str
    kv_cache_quant_algo: str
    exportable: bool
    reason: str
    target: str
    left_out: list[str]


class _Form(TypedDict, total=False):
    """What the values are, where they are there."""

    format: int
    stage: str
    command: str
    finished: str
    git_commit: str | None
    architecture: dict[str, Any]
    configuration: dict[str, Any]
    versions: dict[str, Any]
    metrics: dict[str, Any]
    warnings: list[str]
    inputs: list[_Input]
    outputs: list[_Output]
    draft: dict[str, Any] | None
    quantization: _Quantization | None
    pruned_from: dict[str, Any] | None
    features: dict[str, Any] | None


@dataclass
class Manifest:
    """The content of one ``run.json``. ``started`` is the Unix time at which the stage began."""

    stage: str
    architecture: dict[str, Any]
    configuration: dict[str, Any] = field(default_factory=dict)
    inputs: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.time)
    peak_memory_bytes: dict[str, int] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path, parts: Sequence[str] = ()) -> dict[str, Any]:
        """Describe the files of ``folder`` and write its ``run.json``. Returns the content.

        Args:
            folder: of the output.
            parts: subfolders whose files to describe, if others still change; by default all.
        """
        content = self.content(self._outputs(folder, parts))
        files.write_json(folder / FILE, content)
        return content

    def content(self, outputs: list[dict[str, Any]]) -> dict[str, Any]:
        """The content, for outputs described as by ``files.describe_tree``."""
        content = {
            "format": FORMAT,
            "stage": self.stage,
            "command": redaction.command(),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(time.time() - self.started, 3),
            "architecture": self.architecture,
            "configuration": redaction.hide_in(self.configuration),
            "versions": versions(),
            "git_commit": git_commit(),
            "inputs": self.inputs,
            "outputs": outputs,
            "metrics": self.metrics,
            "warnings": kept_warnings.messages(),
            "peak_memory_bytes": self.peak_memory_bytes,
            **self.extra,
        }
        return sealed(content)

    def _outputs(self, folder: Path, parts: Sequence[str]) -> list[dict[str, Any]]:
        if not parts:
            return files.describe_tree(folder, skip=frozenset({FILE}))
        return [
            {**each, "file": f"{part}/{each['file']}"}
            for part in parts
            for each in files.describe_tree(folder / part)
        ]


def read(folder: Path) -> dict[str, Any] | None:
    """The manifest of ``folder`` (or a report, a JSON file), or None where there is none.

    Raises:
        UsageError: if it is not JSON, not as it was written, or of a newer format than this version
            reads.
    """
    path = folder if folder.is_file() else folder / FILE
    remedy = "make the output again, or delete the file to continue without a manifest"
    if not regular.is_file(path):
        return None
    content: dict[str, Any] = files.read_json_object(path, "manifest", remedy)
    forms.parse(content, _Form, f"manifest {path}", remedy)
    if content.get("format", 0) > FORMAT:
        raise UsageError(
            f"manifest {path}",
            f"its format is {content['format']}, this version reads up to {FORMAT}",
            "use the version that wrote it, named under git_commit",
        )
    seal = content.pop(_SEAL, None)
    if seal != _hash(content) and (seal is not None or content.get("format", 0) > 1):
        raise UsageError(f"manifest {path}", "it was changed after it was written", remedy)
    names = [each["file"] for each in content.get("outputs", [])]
    if any(Path(name).is_absolute() or ".." in Path(name).parts for name in names):
        raise UsageError(f"manifest {path}", "its outputs lie outside of its folder", remedy)
    if any(len(part.encode("utf-8", "replace")) > 255 for n in names for part in Path(n).parts):
        raise UsageError(f"manifest {path}", "its outputs have names that no file has", remedy)
    if len(set(names)) < len(names):  # each would be read and compared once more
        raise UsageError(f"manifest {path}", "it names an output twice", remedy)
    return content


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """``content`` with its hash."""
    return {**content, _SEAL: _hash(content)}


def is_sealed(content: Mapping[str, Any]) -> bool:
    """Whether it is as :func:`sealed` gave it."""
    plain = {name: value for name, value in content.items() if name != _SEAL}
    return content.get(_SEAL) == _hash(plain)


def _hash(content: dict[str, Any]) -> str:
    """Of the values, whatever the layout of the file."""
    plain = json.loads(json.dumps(content))  # every key is a string, as in the file
    return xxhash.xxh3_128_hexdigest(json.dumps(plain, sort_keys=True).encode())


def describe_input(role: str, location: str | Path) -> dict[str, Any]:
    """An input as manifests record it: path (or hub name) and the hash of its own manifest.

    A folder without a manifest is described by the names, sizes and times of its files, a file by
    its hash.
    """
    folder = Path(location)
    entry: dict[str, Any] = {"role": role, "path": str(location)}
    if folder.exists():
        entry["path"] = str(folder.resolve())
        if folder.is_file():
            entry["sha256"] = files.sha256(folder)
        elif (folder / FILE).is_file():
            entry["manifest_sha256"] = files.sha256(folder / FILE)
        else:
            entry["listing_sha256"] = files.listing_sha256(folder)
    return entry


def require_unchanged(entry: Mapping[str, Any], location: str | Path, doing: str) -> None:
    """Raise UsageError if an input is not what :func:`describe_input` found.

    Args:
        doing: what happened meanwhile, in the message.
    """
    if describe_input(entry["role"], location) != entry:
        raise UsageError(
            str(location),
            f"it was changed or replaced while it was {doing}",
            "run again when nothing writes to it",
        )


def damaged_outputs(folder: Path, content: dict[str, Any]) -> list[str]:
    """Files that are missing or whose size is not the manifest's. Hashes are not recomputed."""
    damaged = []
    for entry in content.get("outputs", []):
        path = folder / entry["file"]
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            damaged.append(entry["file"])
    return damaged


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    found = {"python": sys.version.split()[0]}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """Commit of this source tree, with ``+changes`` where it is modified; None outside git."""
    try:
        commit = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+changes" if changed else "")


def _git(*arguments: str) -> str:
    return subprocess.check_output(
        ["git", *arguments],
        cwd=Path(__file__).parent,
        stderr=subprocess.DEVNULL,
        text=True,
        timeout=10,
    ).strip()
