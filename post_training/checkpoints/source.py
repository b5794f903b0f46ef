"""Where a stage's model comes from: a Megatron checkpoint, a Hugging Face folder, or a hub name.

:func:`find_source` resolves what the options name into a :class:`Source`, without torch and without
the network; :func:`fetch_source` downloads a hub name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from post_training.checkpoints import folders, huggingface, torch_dist
from post_training.common import files, manifest, safetensors_index
from post_training.common.errors import UsageError
from post_training.config.model_description import architecture
from post_training.config.options import StageOptions
from post_training.models import families, parallel_check
from post_training.models.architecture import Architecture


@dataclass(frozen=True)
class Source:
    """A model as a stage finds it.

    Attributes:
        location: Megatron checkpoint folder, Hugging Face folder, or hub name.
        is_checkpoint: whether it is a Megatron checkpoint.
        described: the architecture, from the manifest, ``config.json`` or, for a checkpoint of
            Megatron-LM, the flags; None for a hub name until :func:`fetch_source`.
        huggingface: folder or hub name with configuration and tokenizer; None if unknown.
        manifest: content of the checkpoint's ``run.json``, if it has one.
    """

    location: str
    is_checkpoint: bool
    described: Architecture | None
    huggingface: str | None
    manifest: Mapping[str, Any] | None = None

    @property
    def is_local(self) -> bool:
        return Path(self.location).exists()

    @property
    def architecture(self) -> Architecture:
        """The architecture; known for local sources and after :func:`fetch_source`."""
        if self.described is None:
            raise RuntimeError(f"{self.location} is not fetched yet")
        return self.described

    def inputs(self) -> list[dict[str, Any]]:
        """As the next manifest records it."""
        return [manifest.describe_input("model", self.location)]

    def pruned_from(self) -> dict[str, Any]:
        """What a manifest carries on, so that the conf of the unpruned model stays usable."""
        return self._carried("pruned_from")

    def carried(self) -> dict[str, Any]:
        """What a manifest carries on where the weights stay what they are."""
        return self._carried("pruned_from", "quantization", "draft")

    def _carried(self, *names: str) -> dict[str, Any]:
        content = self.manifest or {}
        return {name: content[name] for name in names if content.get(name)}


def find_source(options: StageOptions) -> Source:
    """The source that the arguments name; no torch, no network.

    Raises:
        UsageError: if none is named, it is not there, or the conf contradicts it.
    """
    if options.load:
        return _find_checkpoint(options)
    if not options.pretrained_model_path:
        raise UsageError(
            "no model to work on",
            "neither --load nor --pretrained-model-path is given",
            "set MLM_MODEL_CKPT (a Megatron checkpoint) or HF_MODEL_CKPT (a Hugging Face folder)",
        )
    config = folders.model_source(options.pretrained_model_path)
    if config is None:
        reason = families.unconvertible(options.stated)
        if reason and not options.dry_run:
            raise UsageError(
                f"--pretrained-model-path {options.pretrained_model_path}",
                reason,
                "name a Megatron checkpoint in MLM_MODEL_CKPT; --dry-run shows what would run",
            )
        return Source(
            options.pretrained_model_path,
            is_checkpoint=False,
            described=None,
            huggingface=options.pretrained_model_path,
        )
    return Source(
        options.pretrained_model_path,
        is_checkpoint=False,
        described=architecture(options, config),
        huggingface=options.pretrained_model_path,
    )


def fetch_source(source: Source, options: StageOptions) -> Source:
    """The same source, local: a hub name is downloaded and checked as a folder would have been."""
    if source.is_checkpoint or source.is_local:
        return source
    folder = huggingface.resolve(
        source.location, weights=True, trust_remote_code=options.trust_remote_code
    )
    described = architecture(options, huggingface.read_config(folder))
    parallel_check.check(described, options.parallel)
    return replace(
        source,
        location=str(folder),
        described=described,
        huggingface=str(folder),
    )


def size_estimate(source: Source, bytes_per_parameter: float) -> int:
    """Bytes that a copy of the source will take on disk, for the check of free space."""
    if not source.is_local:
        return 0
    folder = Path(source.location)
    if source.is_checkpoint:
        return files.size_of(torch_dist.iteration_folder(folder))
    entries = safetensors_index.read(folder).values()
    return int(sum(entry.numel for entry in entries) * bytes_per_parameter)


def _find_checkpoint(options: StageOptions) -> Source:
    location = str(options.load)
    folder = Path(location)
    if options.dry_run and not folder.exists():
        # An earlier job is going to make it, of the model that the conf describes.
        return Source(location, True, architecture(options), options.pretrained_model_path)
    folders.checkpoint_folder(folder)
    content = manifest.read(folder)
    carried = folder / torch_dist.HUGGINGFACE
    origin = str(carried) if carried.is_dir() else options.pretrained_model_path
    if content is None:
        # Saved by Megatron-LM: only the flags describe it.
        return Source(location, True, architecture(options), origin)
    damaged = manifest.damaged_outputs(folder, content)
    if damaged:
        raise UsageError(
            f"checkpoint {folder}",
            f"{len(damaged)} of its files are missing or cut short, e.g. {damaged[0]}",
            "copy or make it again",
        )
    if (content.get("draft") or {}).get("offline") and options.stage not in ("eagle3", "convert"):
        raise UsageError(
            f"checkpoint {folder}",
            "it has a draft and not the target's layers (convert.sh --export-offline-model)",
            "join it with its target: convert.sh <conf> --algorithm eagle3 --draft-model-path "
            f"{folder}",
        )
    described = architecture(options, manifest=content)
    return Source(location, True, described, origin, content)
