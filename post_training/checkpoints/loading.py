"""The model of a stage's source: this rank's part with its weights, tokenizer, end tokens.

``huggingface_weights.py`` reads Hugging Face folders, ``torch_dist.py`` checkpoints.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from post_training.checkpoints import finite, huggingface, tokenizers, torch_dist
from post_training.checkpoints.huggingface_weights import HuggingFaceWeights
from post_training.checkpoints.source import Source
from post_training.common import files, manifest, recorded
from post_training.common.errors import UsageError
from post_training.config.options import StageOptions
from post_training.distributed.session import Session
from post_training.models import builder
from post_training.models.builder import BuildOptions

if TYPE_CHECKING:
    from megatron.core.transformer import MegatronModule

    from post_training.checkpoints.dequantize import Exported

logger = logging.getLogger(__name__)


def _no_export(folder: Path) -> Exported:
    raise ValueError(f"{folder} is an export of a quantized model, which only evaluate reads")


def load(
    source: Source,
    options: StageOptions,
    session: Session,
    *,
    sequence_parallel: bool = False,
    layer_spec: str | None = None,
    open_export: Callable[[Path], Exported] = _no_export,
) -> MegatronModule:
    """This rank's part of the model with its weights; a collective call.

    Args:
        source: local, from ``find_source`` or ``fetch_source``.
        sequence_parallel: split activations over the tensor-parallel ranks. It saves memory in
            training; inference gains nothing and would have to pad.
        layer_spec: another than the options'.
        open_export: opens the folder of a source that is ``exported``.

    UsageError if its files are not those of its ``run.json``, the weights do not fit or are not
    finite, or the number of parameters is not the source's.
    """
    from post_training.distributed import collectives

    # Features stand for the layers of a target whose checkpoint was made without them.
    offline = bool(((source.manifest or {}).get("draft") or {}).get("offline"))
    build = replace(
        build_options(source, options),
        sequence_parallel=sequence_parallel,
        layer_spec=layer_spec or options.build.layer_spec,
    )
    model = builder.build(source.architecture, build, layers=not offline)
    with verified(Path(source.location), options):
        if source.is_checkpoint:
            torch_dist.load(model, Path(source.location))
            logger.info("loaded checkpoint %s", source.location)
        else:
            exported = open_export(Path(source.location)) if source.exported else None
            weights = HuggingFaceWeights(model, source, options, exported, session.show_progress)
            weights.read(model)
            weights.finish(model)
            finite.check_model(model, f"model {source.location}", Path(source.location))
    collectives.on_first_rank(source.require_unchanged)
    return model


@contextlib.contextmanager
def verified(folder: Path, options: StageOptions) -> Iterator[None]:
    """Compare a folder's files with the hashes in its ``run.json`` while the block loads them.

    A collective call. The ranks share the files; the page cache has what is read twice.

    Raises:
        UsageError: at the end of the block; names a file that is not what was recorded.
    """
    import torch
    from torch.distributed.checkpoint.api import CheckpointException

    from post_training.distributed import collectives

    outputs = [] if options.no_verify else (manifest.read(folder) or {}).get("outputs", [])
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    pool = ThreadPoolExecutor(1)
    # One reader runs ahead of the load, in its order; several would take the disk from it.
    changed = pool.submit(files.changed, folder, outputs[rank::ranks], workers=1)
    try:
        yield
    except (Exception, CheckpointException) as error:  # the latter is no Exception
        # What is damaged may not load. Another rank may be the one that looks at it.
        if damaged := files.changed(folder, outputs):
            raise recorded.not_as_recorded(folder / damaged[0]) from error
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    if found := collectives.first_failure(next(iter(changed.result()), None)):
        raise recorded.not_as_recorded(folder / found)


def build_options(source: Source, options: StageOptions) -> BuildOptions:
    """How the model is built, as the options state and the checkpoint needs it."""
    if not source.is_checkpoint or source.manifest is not None:
        return options.build
    keys = torch_dist.uses_transformer_engine_keys(Path(source.location))
    return replace(options.build, transformer_engine_keys=keys)


def local_huggingface(source: Source, options: StageOptions) -> Path:
    """The local folder with the source's configuration and tokenizer; UsageError without one."""
    if source.huggingface is None:
        raise UsageError(
            f"checkpoint {source.location}",
            "it carries no huggingface/ folder with configuration and tokenizer",
            "set HF_MODEL_CKPT to the model's Hugging Face folder or hub name",
        )
    return huggingface.resolve(
        source.huggingface, weights=False, trust_remote_code=options.trust_remote_code
    )


def tokenizer(source: Source, options: StageOptions) -> Any:
    """The tokenizer of ``--tokenizer-model``, or the source's own.

    Raises:
        UsageError: if there is none, transformers cannot load it, or it makes tokens that the
            model has no embedding for.
    """
    location = options.tokenizer_model
    if source.huggingface and not (location and Path(location).is_dir()):
        # A checkpoint of ours carries its tokenizer; a hub name is the conf's default.
        location = str(local_huggingface(source, options))
    found = tokenizers.read(str(location), options)
    _require_embeddings(f"tokenizer {location}", found, source.architecture.vocab_size)
    return found


def _require_embeddings(what: str, tokenizer: Any, rows: int) -> None:
    """Raise UsageError if the tokenizer makes ids of ``rows`` and more from ordinary text.

    Special tokens that no template writes are let pass with a warning: text models cut out of one
    that sees images have a token for an image, and no row for it.
    """
    beyond = {text: number for text, number in tokenizer.get_vocab().items() if number >= rows}
    if not beyond:
        return
    template = str(tokenizer.chat_template or "")
    ends = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    added = tokenizer.get_added_vocab()
    used = [text for text in beyond if text not in added or text in ends or text in template]
    highest = max(beyond, key=lambda text: beyond[text])
    if used:
        raise UsageError(
            what,
            f"it has ids up to {beyond[highest]} ({highest}), the model has {rows} embeddings",
            "resize the model's embeddings in transformers (resize_token_embeddings) and train "
            "the new ones, or name the model's own tokenizer in TOKENIZER_MODEL",
        )
    logger.warning(
        "%s has ids up to %d (%s), the model %d embeddings: texts must not contain %s",
        *(what, beyond[highest], highest, rows, ", ".join(beyond)),
    )


def end_tokens(source: Source, options: StageOptions, tokenizer: Any) -> list[int]:
    """Ids of the tokens that end an answer: the tokenizer's and the model's."""
    found = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    if source.huggingface is not None:
        found += huggingface.end_tokens(local_huggingface(source, options))
    return sorted(set(found))
