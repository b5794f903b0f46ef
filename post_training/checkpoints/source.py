"""Where a stage's model comes from: a Megatron checkpoint, a Hugging Face folder, or a hub name.

:func:`find_source` resolves what the options name into a :class:`Source`, without torch and without
the network. A hub name is described after :func:`fetch_configuration`; :func:`fetch_source`
downloads the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from post_training.checkpoints import huggingface, model_folders, torch_dist
from post_training.common import (
    files,
    inputs,
    manifest,
    recorded,
    safetensors_index,
)
from post_training.common.errors import UsageError
from post_training.config.model_description import architecture
from post_training.config.options import StageOptions
from post_training.models import parameter_count
from post_training.models.architecture import Architecture
from post_training.models.families import registry as families


@dataclass(frozen=True)
class Source:
    """A model as a stage finds it.

    Attributes:
        location: Megatron checkpoint folder, Hugging Face folder, or hub name.
        is_checkpoint: whether it is a Megatron checkpoint.
        described: the architecture, from the manifest, ``config.json`` or, for a checkpoint of
            Megatron-LM, the flags; None for a hub name until :func:`fetch_configuration`.
        huggingface: folder or hub name with configuration and tokenizer; None if unknown.
        manifest: content of the checkpoint's ``run.json``, if it has one.
        exported: an export stored its weights quantized; they are decoded while they are loaded.
        entry: how manifests record it as an input, from before anything of it is loaded.
    """

    location: str
    is_checkpoint: bool
    described: Architecture | None
    huggingface: str | None
    manifest: Mapping[str, Any] | None = None
    exported: bool = False
    entry: Mapping[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "entry", manifest.describe_input("model", self.location))

    @property
    def is_local(self) -> bool:
        return Path(self.location).exists()

    @property
    def architecture(self) -> Architecture:
        """The architecture; known for local sources and after :func:`fetch_configuration`."""
        if self.described is None:
            raise RuntimeError(f"the configuration of {self.location} is not fetched yet")
        return self.described

    def inputs(self, role: str = "model") -> list[dict[str, Any]]:
        """As the next manifest records it."""
        return [{**self.entry, "role": role}]

    def require_unchanged(self) -> None:
        """Raise UsageError if it was replaced since it was found."""
        manifest.require_unchanged(self.entry, self.location, "loaded")

    def pruned_from(self) -> dict[str, Any]:
        """What a manifest carries on, so that the conf of the unpruned model stays usable."""
        return self.carried(("pruned_from",))

    def carried(
        self, names: Sequence[str] = ("pruned_from", "quantization", "draft")
    ) -> dict[str, Any]:
        """What a manifest carries on where the weights stay what they are."""
        content = self.manifest or {}
        return {name: content[name] for name in names if content.get(name)}


def find_source(options: StageOptions, *, or_export: bool = False) -> Source:
    """The source that the options name; no torch, no network.

    UsageError if none is named, it is not there, or the conf contradicts it. With ``or_export`` it
    may be a local folder with the export of a quantized model.
    """
    if options.load:
        return _find_checkpoint(options, options.load)
    location = options.pretrained_model_path
    if not location:
        raise UsageError(
            "no model to work on",
            "neither --load nor --pretrained-model-path is given",
            "set MLM_MODEL_CKPT (a Megatron checkpoint) or HF_MODEL_CKPT (a Hugging Face folder)",
        )
    described, origin, exported = None, location, False
    # With --dry-run a folder may be one of another machine, or yet to be downloaded.
    elsewhere = options.dry_run and options.states_model and not Path(location).exists()
    if not elsewhere and not inputs.is_hub_name(location):
        exported = or_export and model_folders.is_export(Path(location))
        described = architecture(
            options, model_folders.model_folder(Path(location), exported=exported)
        )
        if not options.no_verify:
            recorded.require_recorded(Path(location), manifest.read(Path(location)) or {})
    elif (folder := huggingface.resolved(location)) is not None:
        described, origin = architecture(options, model_folders.unquantized(folder)), str(folder)
    elif not options.dry_run and (reason := families.unconvertible(options.stated)):
        raise UsageError(
            f"--pretrained-model-path {location}",
            reason,
            "name a Megatron checkpoint in MLM_MODEL_CKPT; --dry-run shows what would run",
        )
    elif options.dry_run and not options.states_model:
        config = huggingface.known_config(location)
        described = architecture(options, config) if config else None
    return Source(location, False, described, origin, exported=exported)


def fetch_configuration(source: Source, options: StageOptions) -> bool:
    """Download configuration and tokenizer of a hub name; whether it is one. A collective call.

    What a stage refuses, it refuses then, before hours of downloading weights: its check is run
    again, and :func:`find_source` finds the architecture.
    """
    if source.is_checkpoint or source.is_local:
        return False
    trusted = options.trust_remote_code
    huggingface.resolve(source.location, weights=False, trust_remote_code=trusted)
    return True


def fetch_source(source: Source, options: StageOptions) -> Source:
    """The same source, local: the weights of a hub name are downloaded. A collective call."""
    if source.is_checkpoint or source.is_local:
        return source
    trusted = options.trust_remote_code
    folder = huggingface.resolve(source.location, weights=True, trust_remote_code=trusted)
    model_folders.model_folder(folder)
    return replace(source, location=str(folder), huggingface=str(folder))


def size_estimate(source: Source, options: StageOptions, *, optimizer: bool = False) -> int:
    """Bytes that a checkpoint or an export of the source takes, for the check of free space.

    With the state of Adam: its two moments and the weights in float32 besides. 0 for a hub name
    whose configuration is not there yet.
    """
    weight = 4 if options.precision == "fp32" else 2
    per_parameter = weight + (12 if optimizer else 0)
    if not source.is_local:
        known = source.described is not None and not options.dry_run
        return parameter_count.total(source.architecture) * per_parameter if known else 0
    folder = Path(source.location)
    if not source.is_checkpoint:
        entries = safetensors_index.read(folder).values()
        # A byte of MXFP4 is two parameters.
        return sum(e.numel * (2 if e.dtype == "U8" else 1) for e in entries) * per_parameter
    stored = files.size_of(torch_dist.iteration_folder(folder))
    has_optimizer = (source.manifest or {}).get("stage") in ("distill", "finetune", "eagle3")
    return stored if has_optimizer else stored * per_parameter // weight


def _find_checkpoint(options: StageOptions, location: str) -> Source:
    folder, origin, content = Path(location), options.pretrained_model_path, None
    # With --dry-run an earlier job may be going to make it, of the model that the conf describes.
    if folder.exists() or not options.dry_run:
        checkpoint_folder(folder)
        content = manifest.read(folder)
    if content is not None:
        _check_content(options, folder, content)
        if not options.no_verify:
            recorded.require_recorded(folder, content)
        _check_quantized_layout(options, content)
    if (folder / torch_dist.HUGGINGFACE).is_dir():
        origin = str(folder / torch_dist.HUGGINGFACE)
    # A checkpoint of Megatron-LM has no manifest: the flags describe it, or its model's folder.
    config = None
    if content is None and origin and not options.states_model:
        config = huggingface.known_config(origin)
    return Source(location, True, architecture(options, config, content), origin, content)


def _check_quantized_layout(options: StageOptions, content: Mapping[str, Any]) -> None:
    """Raise UsageError for a layout in which ModelOpt cannot restore quantized experts."""
    sizes = options.parallel
    if content.get("quantization") and sizes.expert > 1 and sizes.tensor > 1:
        raise UsageError(
            f"TP={sizes.tensor} EP={sizes.expert} with --load {options.load}",
            "it is quantized, and ModelOpt divides quantized experts by TP or by EP, not by both",
            "set TP=1, or EP=1; PP may be larger",
        )


def _check_content(options: StageOptions, folder: Path, content: dict[str, Any]) -> None:
    """Raise UsageError if the checkpoint is damaged, or made for other stages than this one."""
    damaged = manifest.damaged_outputs(folder, content)
    if damaged:
        raise UsageError(
            f"checkpoint {folder}",
            f"{len(damaged)} of its files are missing or cut short, e.g. {damaged[0]}",
            "copy or make it again",
        )
    offline = (content.get("draft") or {}).get("offline")
    if offline and options.stage not in ("eagle3", "convert", "export"):
        raise UsageError(
            f"checkpoint {folder}",
            "it has a draft and not the target's layers (convert.sh --export-offline-model)",
            "join it with its target: convert.sh <conf> --algorithm eagle3 --draft-model-path "
            f"{folder}",
        )


def checkpoint_folder(folder: Path, option: str = "--load") -> Path:
    """The folder of a checkpoint's weights (``release``, ``iter_...``); UsageError without them."""
    what = f"{option} {folder}"
    inputs.check_folder(folder, what, "name the folder that a stage saved")
    found = torch_dist.iteration_folder(folder, what)
    if not any(found.glob("*.distcp")):
        raise UsageError(what, f"{found} has no weights (*.distcp)", "copy or make it again")
    return found
