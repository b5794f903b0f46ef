"""Where a stage's model comes from, and the model itself.

A stage names a Megatron checkpoint (``--load``) or a Hugging Face folder or hub name
(``--pretrained-model-path``). :func:`find` resolves either into a :class:`Source` without torch;
:func:`load` builds this rank's part and fills it.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from post_training.checkpoints import folders, huggingface, torch_dist
from post_training.common import files, manifest
from post_training.common.errors import UsageError
from post_training.config import arguments
from post_training.drafts.eagle3.draft import Draft
from post_training.models import families, parallel_check
from post_training.models.architecture import Architecture

if TYPE_CHECKING:
    from megatron.core.transformer import MegatronModule

    from post_training.distributed.runtime import Session
    from post_training.models.builder import BuildOptions

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """A model as a stage finds it.

    Attributes:
        location: Megatron checkpoint folder, Hugging Face folder, or hub name.
        is_checkpoint: whether it is a Megatron checkpoint.
        described: the architecture, from the manifest, ``config.json`` or, for a checkpoint of
            Megatron-LM, the flags; None for a hub name until :func:`fetch`.
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
        """The architecture; known for local sources and after :func:`fetch`."""
        if self.described is None:
            raise RuntimeError(f"{self.location} is not fetched yet")
        return self.described

    def inputs(self) -> list[dict[str, Any]]:
        """As the next manifest records it."""
        return [manifest.describe_input("model", self.location)]

    @property
    def draft(self) -> Draft | None:
        """The draft that the checkpoint has beside its target; None without one."""
        content = (self.manifest or {}).get("draft")
        return Draft.from_json(content) if content else None

    def pruned_from(self) -> dict[str, Any]:
        """What a manifest carries on, so that the conf of the unpruned model stays usable."""
        return self._carried("pruned_from")

    def carried(self) -> dict[str, Any]:
        """What a manifest carries on where the weights stay what they are."""
        return self._carried("pruned_from", "quantization", "draft")

    def _carried(self, *names: str) -> dict[str, Any]:
        content = self.manifest or {}
        return {name: content[name] for name in names if content.get(name)}


def find(args: argparse.Namespace) -> Source:
    """The source that the arguments name; no torch, no network.

    Raises:
        UsageError: if none is named, it is not there, or the conf contradicts it.
    """
    if args.load:
        return _find_checkpoint(args)
    if not args.pretrained_model_path:
        raise UsageError(
            "no model to work on",
            "neither --load nor --pretrained-model-path is given",
            "set MLM_MODEL_CKPT (a Megatron checkpoint) or HF_MODEL_CKPT (a Hugging Face folder)",
        )
    config = folders.model_source(args.pretrained_model_path)
    if config is None:
        reason = families.unconvertible(arguments.stated(args))
        if reason and not args.dry_run:
            raise UsageError(
                f"--pretrained-model-path {args.pretrained_model_path}",
                reason,
                "name a Megatron checkpoint in MLM_MODEL_CKPT; --dry-run shows what would run",
            )
        return Source(
            args.pretrained_model_path,
            is_checkpoint=False,
            described=None,
            huggingface=args.pretrained_model_path,
        )
    return Source(
        args.pretrained_model_path,
        is_checkpoint=False,
        described=arguments.architecture(args, config),
        huggingface=args.pretrained_model_path,
    )


def require_draft(source: Source, args: argparse.Namespace) -> None:
    """Raise UsageError unless the source is a checkpoint with a draft. No torch."""
    if not source.is_checkpoint:
        raise UsageError(
            f"--pretrained-model-path {source.location}",
            "a Hugging Face folder has no draft",
            "set MLM_MODEL_CKPT to what eagle3.sh saved",
        )
    if args.dry_run and not source.is_local:
        return  # an earlier job is going to make it
    if source.draft is None and not torch_dist.holds(Path(args.load), "eagle_module."):
        raise UsageError(
            f"--load {args.load}",
            "it has no draft",
            "name what eagle3.sh saved, or attach one: convert.sh <conf> --algorithm eagle3",
        )


def fetch(source: Source, args: argparse.Namespace) -> Source:
    """The same source, local: a hub name is downloaded and checked as a folder would have been."""
    if source.is_checkpoint or source.is_local:
        return source
    folder = huggingface.resolve(
        source.location, weights=True, trust_remote_code=args.trust_remote_code
    )
    described = arguments.architecture(args, huggingface.read_config(folder))
    parallel_check.check(described, arguments.parallel(args))
    return replace(
        source,
        location=str(folder),
        described=described,
        huggingface=str(folder),
    )


def build_options(args: argparse.Namespace, source: Source) -> BuildOptions:
    """The run-time choices that the arguments state."""
    from post_training.models.builder import BuildOptions

    transformer_engine_keys = True
    if source.is_checkpoint and source.manifest is None:
        transformer_engine_keys = torch_dist.uses_transformer_engine_keys(Path(source.location))
    return BuildOptions(
        dtype=arguments.precision(args),
        layer_spec="transformer_engine" if args.export_default_te_spec else "modelopt",
        transformer_engine_keys=transformer_engine_keys,
        local_attention=args.export_force_local_attention,
        meta_device=args.init_model_with_meta_device,
        # Sequence parallelism saves training memory; inference, which is all that the stages that
        # come here do, gains nothing and would have to pad.
        sequence_parallel=False,
        first_stage_layers=args.num_layers_in_first_pipeline_stage,
        last_stage_layers=args.num_layers_in_last_pipeline_stage,
        overrides=arguments.transformer_overrides(args),
    )


def load(
    source: Source, options: BuildOptions, session: Session, *, trust_remote_code: bool = False
) -> MegatronModule:
    """This rank's part of the model with its weights; a collective call.

    Raises:
        UsageError: if the weights do not fit, or the number of parameters is not the source's.
    """
    from post_training.models import builder as model_building

    # Features stand for the layers of a target whose checkpoint was made without them.
    offline = source.draft is not None and source.draft.offline
    model = model_building.build(source.architecture, options, layers=not offline)
    if source.is_checkpoint:
        torch_dist.load(model, Path(source.location))
        logger.info("loaded checkpoint %s", source.location)
        return model
    expected = huggingface.load_weights(
        model,
        Path(source.location),
        dtype=model_building.torch_dtype(options.dtype),
        tied_embeddings=source.architecture.share_embeddings_and_output_weights,
        trust_remote_code=trust_remote_code,
        show_progress=session.show_progress,
    )
    actual = model_building.count_parameters(model)
    if actual != expected:
        raise UsageError(
            f"model {source.location}",
            f"it has {expected:,} parameters, the Megatron model {actual:,}",
            "the conf does not describe this model: compare it with config.json",
        )
    logger.info("loaded %s: %s parameters, as in the source", source.location, f"{actual:,}")
    return model


def local_huggingface(source: Source, args: argparse.Namespace) -> Path:
    """A local folder with the configuration and tokenizer that go with ``source``.

    Raises:
        UsageError: if it is not known or cannot be fetched.
    """
    if source.huggingface is None:
        raise UsageError(
            f"checkpoint {source.location}",
            "it carries no huggingface/ folder with configuration and tokenizer",
            "set HF_MODEL_CKPT to the model's Hugging Face folder or hub name",
        )
    return huggingface.resolve(
        source.huggingface, weights=False, trust_remote_code=args.trust_remote_code
    )


def tokenizer(source: Source, args: argparse.Namespace) -> Any:
    """The tokenizer that ``--tokenizer-model`` names, or the source's own."""
    location = args.tokenizer_model
    if not location or not Path(location).is_dir():
        # A checkpoint of ours carries its tokenizer; a hub name is the conf's default.
        location = str(local_huggingface(source, args)) if source.huggingface else location
    return huggingface.load_tokenizer(location, trust_remote_code=args.trust_remote_code)


def end_tokens(source: Source, args: argparse.Namespace, tokenizer: Any) -> list[int]:
    """Ids of the tokens that end an answer: the tokenizer's, and those of the generation config."""
    found = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    if source.huggingface is not None:
        path = local_huggingface(source, args) / "generation_config.json"
        if path.is_file():
            stated = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
            found += [stated] if isinstance(stated, int) else list(stated or ())
    return sorted(set(found))


def _find_checkpoint(args: argparse.Namespace) -> Source:
    folder = Path(args.load)
    if args.dry_run and not folder.exists():
        # An earlier job is going to make it, of the model that the conf describes.
        return Source(args.load, True, arguments.architecture(args), args.pretrained_model_path)
    folders.checkpoint_folder(folder)
    content = manifest.read(folder)
    carried = folder / torch_dist.HUGGINGFACE
    origin = str(carried) if carried.is_dir() else args.pretrained_model_path
    if content is None:
        # Saved by Megatron-LM: only the flags describe it.
        return Source(args.load, True, arguments.architecture(args), origin)
    damaged = manifest.damaged_outputs(folder, content)
    if damaged:
        raise UsageError(
            f"checkpoint {folder}",
            f"{len(damaged)} of its files are missing or cut short, e.g. {damaged[0]}",
            "copy or make it again",
        )
    if (content.get("draft") or {}).get("offline") and args.stage not in ("eagle3", "convert"):
        raise UsageError(
            f"checkpoint {folder}",
            "it has a draft and not the target's layers (convert.sh --export-offline-model)",
            "join it with its target: convert.sh <conf> --algorithm eagle3 --draft-model-path "
            f"{folder}",
        )
    described = arguments.architecture(args, manifest=content)
    return Source(args.load, True, described, origin, content)


def size_estimate(source: Source, bytes_per_parameter: float) -> int:
    """Bytes that a copy of the source will take on disk, for the check of free space."""
    if not source.is_local:
        return 0
    folder = Path(source.location)
    if source.is_checkpoint:
        return files.size_of(torch_dist.iteration_folder(folder))
    from post_training.common import safetensors_index

    entries = safetensors_index.read(folder).values()
    return int(sum(entry.numel for entry in entries) * bytes_per_parameter)
