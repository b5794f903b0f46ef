"""Checks before the work: paths, folders, free space, division over processes. No torch.

Each raises a UsageError that names the option or path with its value, the cause and the remedy.
Stages call them from their ``check``, so that they run within the first second, before anything is
launched.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

from post_training import (
    arguments,
    checkpoint,
    data_formats,
    families,
    files,
    manifest,
    parallel,
    records,
    safetensors_index,
    tokenizer_folder,
)
from post_training.architecture import Architecture
from post_training.errors import UsageError, suggest

_HUB_NAME = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_ROWS_CHECKED = 20_000  # about a second of JSONL; rows beyond are checked when they are read


def required(args: argparse.Namespace, option: str, variable: str) -> str:
    """The value of ``option``; an error names it and the launcher's variable."""
    value = getattr(args, option.lstrip("-").replace("-", "_"))
    if not value:
        raise UsageError(f"{option} (not given)", "it is needed", f"set {variable} or {option}")
    return str(value)


def is_hub_name(value: str) -> bool:
    """Whether ``value`` means a repository on the hub: ``org/name``, and no such path exists.

    What starts with ``.``, ``/`` or ``~``, or has several slashes, is a path.
    """
    return _HUB_NAME.fullmatch(value) is not None and not Path(value).exists()


def model_source(value: str, option: str = "--pretrained-model-path") -> dict[str, Any] | None:
    """Check a Hugging Face folder and return its ``config.json``; None for a hub name."""
    return None if is_hub_name(value) else model_folder(Path(value), option)


def model_folder(
    folder: Path, option: str = "--pretrained-model-path", *, weights: bool = True
) -> dict[str, Any]:
    """Check a Hugging Face model folder; returns the content of its ``config.json``.

    Args:
        folder: the folder.
        option: the flag that named it, for messages.
        weights: whether it must hold weights: safetensors, complete, not quantized.

    Raises:
        UsageError: for anything that is missing, broken, or cannot be converted.
    """
    what = f"{option} {folder}"
    _folder_with_files(folder, what, "name a Hugging Face folder, or a hub name such as org/name")
    path = folder / "config.json"
    if not path.is_file():
        remedy = "name the folder of a Hugging Face model"
        if (folder / checkpoint.TRACKER).is_file():
            remedy = "it is a Megatron checkpoint: name it in MLM_MODEL_CKPT (--load)"
        raise UsageError(what, "it has no config.json", remedy)
    config = _json_object(path)
    if not weights:
        return config
    families.refuse_quantized(config, str(path))
    if (folder / "hf_quant_config.json").is_file():
        quantization = _json_object(folder / "hf_quant_config.json").get("quantization", {})
        families.refuse_quantized(
            {"quantization_config": {"quant_method": "modelopt", **quantization}},
            str(folder / "hf_quant_config.json"),
        )
    if not any((folder / n).is_file() for n in (safetensors_index.INDEX, safetensors_index.SINGLE)):
        _no_safetensors(folder, what)
    safetensors_index.read(folder)
    return config


def checkpoint_folder(folder: Path, option: str = "--load") -> Path:
    """Check a Megatron checkpoint; returns its folder of weights (``release``, ``iter_...``).

    Raises:
        UsageError: if it is missing, no checkpoint, or its weights are incomplete.
    """
    what = f"{option} {folder}"
    _folder_with_files(folder, what, "name the folder that a stage saved")
    tracker = folder / checkpoint.TRACKER
    if not tracker.is_file() and not (folder / "metadata.json").is_file():
        remedy = "name the folder that a stage saved, or one of its iterations"
        if (folder / "config.json").is_file():
            remedy = "it is a Hugging Face folder: name it in HF_MODEL_CKPT, or convert it first"
        raise UsageError(what, f"it has neither {checkpoint.TRACKER} nor metadata.json", remedy)
    if tracker.is_file():
        text = tracker.read_text(encoding="utf-8", errors="replace").strip()
        if text != checkpoint.RELEASE and not text.isdecimal():
            raise UsageError(
                f"{what}: {checkpoint.TRACKER} says {text[:40]!r}",
                "neither 'release' nor an iteration number",
                "write the name of an iteration that is there into it",
            )
    found = checkpoint.iteration_folder(folder)
    if not any(found.glob("*.distcp")):
        raise UsageError(what, f"{found} has no weights (*.distcp)", "copy or make it again")
    return found


def check_output(folder: Path, args: argparse.Namespace, needed: int = 0) -> None:
    """Check that ``folder`` can be written: not occupied, parent writable, room for ``needed``.

    Args:
        folder: output folder of a stage; appears under its name only when it is complete.
        args: with ``--overwrite`` an existing output is replaced, once the new one is complete.
        needed: estimated bytes.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"output {folder}", "it is a file", "name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not args.overwrite:
        raise UsageError(
            f"output folder {folder}",
            _what_lies_there(folder),
            "delete it, name another, or give --overwrite (MLM_EXTRA_ARGS=--overwrite)",
        )
    disk_space(folder, needed)
    writable(folder)


def writable(path: Path, what: str = "") -> None:
    """Raise UsageError unless this user may make ``path``, a file or a folder.

    An output is renamed into place, so the folder above it counts even where it exists.

    Args:
        what: the output in a message (``output <path>``).
    """
    parent = _nearest_existing(path.absolute().parent)
    if not parent.is_dir():
        raise UsageError(what or f"output {path}", f"{parent} is a file", "name another place")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(
            what or f"output {path}",
            f"user {os.getuid()} may not write to {parent}, which is user {parent.stat().st_uid}'s",
            "name another place, or run as its user; in docker: "
            'docker run --user "$(id -u):$(id -g)"',
        )


def disk_space(folder: Path, needed: int) -> None:
    """Raise UsageError unless the file system of ``folder`` has ``needed`` bytes free."""
    parent = _nearest_existing(folder)
    if not parent.is_dir():
        raise UsageError(f"output {folder}", f"{parent} is a file", "name another folder")
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise UsageError(
            f"output {folder}",
            f"about {_gigabytes(needed)} are needed and {_gigabytes(free)} are free on {parent}",
            "free some space, or set MLM_WORK_DIR to a larger disk",
        )


def check_layout(architecture: Architecture, args: argparse.Namespace) -> None:
    """Raise UsageError unless the parallel sizes divide the model."""
    parallel.check(architecture, arguments.parallel(args))


def tokenizer(value: str, option: str = "--tokenizer-model") -> None:
    """Check a tokenizer folder; of a hub name only the form can be checked offline."""
    if is_hub_name(value):
        return
    folder = Path(value)
    _folder_with_files(folder, f"{option} {folder}", "name a folder with tokenizer.json")
    if not tokenizer_folder.present(folder):
        raise UsageError(
            f"{option} {folder}",
            f"it has none of {', '.join(tokenizer_folder.FILES)}",
            "name the folder of the model's tokenizer in TOKENIZER_MODEL",
        )


def data(source: str, option: str) -> None:
    """Check local data: JSONL, parquet, CSV or text. Names of data sets on the hub pass.

    The first rows are read, so that a malformed line shows with its number.

    Raises:
        UsageError: if it is missing, empty, malformed, or its rows lack the known fields.
    """
    if not records.is_local(source):
        return
    path = Path(source).expanduser()
    count = 0
    for file in records.list_files(path, option):
        for row in islice(records.read(file, option), _ROWS_CHECKED - count):
            data_formats.document_of(row, option)
            count += 1
    if not count:
        raise UsageError(f"{option} {path}", "it holds no rows", "give a file with data")


def check_choice(option: str, value: str, known: list[str]) -> None:
    """Raise UsageError with the nearest of the ``known`` names unless ``value`` is one."""
    if value not in known:
        raise UsageError(
            f"{option} {value}",
            "unknown name",
            suggest(value, known) or f"known are {', '.join(known)}",
        )


def _folder_with_files(folder: Path, what: str, remedy: str) -> None:
    """A folder that is there and not empty."""
    files.recover(folder)
    if not folder.exists():
        parent = _nearest_existing(folder)
        names = [each.name for each in parent.iterdir()] if parent == folder.parent else []
        raise UsageError(
            what, "there is no such folder", f"{suggest(folder.name, names)} {remedy}".strip()
        )
    if not folder.is_dir():
        raise UsageError(what, "it is a file, not a folder", remedy)
    if not any(folder.iterdir()):
        raise UsageError(what, "the folder is empty", remedy)


def _no_safetensors(folder: Path, what: str) -> None:
    pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
    if pickled:
        raise UsageError(
            what,
            f"its weights are pickled ({pickled[0]}): loading them could run any code",
            "save the model as safetensors: transformers' save_pretrained does",
        )
    raise UsageError(
        what,
        f"it has neither {safetensors_index.SINGLE} nor {safetensors_index.INDEX}",
        "download the weights too, or name a folder that has them",
    )


def _json_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"file {path}", f"it cannot be read as JSON: {error}", "copy or download it again"
        ) from error
    if not isinstance(content, dict):
        raise UsageError(f"file {path}", "it is no JSON object", "copy or download it again")
    return content


def _what_lies_there(folder: Path) -> str:
    """Why an occupied output folder is not overwritten: what is in it."""
    content = manifest.read(folder)
    if content is None:
        return "it is not empty, and no stage's manifest says what it is"
    made = f"it holds the output of {content.get('stage')}, finished {content.get('finished')}"
    if manifest.damaged_outputs(folder, content):
        return f"{made}, now damaged"
    if content.get("command") == manifest.command():
        return f"{made}, complete, made by this same command"
    return f"{made}, complete, made by: {content.get('command')}"


def _nearest_existing(path: Path) -> Path:
    """The nearest parent (or the path itself) that exists."""
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.exists())


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
