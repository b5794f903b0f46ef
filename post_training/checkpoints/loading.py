"""The model of a stage's source: this rank's part with its weights, tokenizer, end tokens."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from post_training.checkpoints import finite, huggingface, torch_dist
from post_training.checkpoints.source import Source
from post_training.common import files
from post_training.common.errors import UsageError
from post_training.config.options import StageOptions
from post_training.models import builder
from post_training.models.builder import BuildOptions

if TYPE_CHECKING:
    from megatron.core.transformer import MegatronModule

    from post_training.distributed.session import Session
    from post_training.models.builder import BuildOptions

logger = logging.getLogger(__name__)


def load(
    source: Source,
    options: StageOptions,
    session: Session,
    *,
    sequence_parallel: bool = False,
    layer_spec: str | None = None,
) -> MegatronModule:
    """This rank's part of the model with its weights; a collective call.

    Args:
        source: local, from ``find_source`` or ``fetch_source``.
        options: the stage's.
        session: the process's.
        sequence_parallel: split activations over the tensor-parallel ranks. It saves memory in
            training; inference gains nothing and would have to pad.
        layer_spec: another than the options'.

    Raises:
        UsageError: if the weights do not fit, or the number of parameters is not the source's.
    """
    # Features stand for the layers of a target whose checkpoint was made without them.
    offline = bool(((source.manifest or {}).get("draft") or {}).get("offline"))
    build = build_options(source, options, sequence_parallel=sequence_parallel)
    if layer_spec is not None:
        build = replace(build, layer_spec=layer_spec)
    model = builder.build(source.architecture, build, layers=not offline)
    if source.is_checkpoint:
        torch_dist.load(model, Path(source.location))
        logger.info("loaded checkpoint %s", source.location)
        return model
    expected = huggingface.load_weights(
        model,
        Path(source.location),
        dtype=builder.torch_dtype(build.dtype),
        tied_embeddings=source.architecture.share_embeddings_and_output_weights,
        trust_remote_code=options.trust_remote_code,
        show_progress=session.show_progress,
    )
    finite.check_model(model, f"model {source.location}", Path(source.location))
    actual = builder.count_parameters(model)
    if actual != expected:
        raise UsageError(
            f"model {source.location}",
            f"it has {expected:,} parameters, the Megatron model {actual:,}",
            "the conf does not describe this model: compare it with config.json",
        )
    logger.info("loaded %s: %s parameters, as in the source", source.location, f"{actual:,}")
    return model


def build_options(
    source: Source, options: StageOptions, *, sequence_parallel: bool = False
) -> BuildOptions:
    """How the model is built, as the options state."""
    transformer_engine_keys = True
    if source.is_checkpoint and source.manifest is None:
        transformer_engine_keys = torch_dist.uses_transformer_engine_keys(Path(source.location))
    return BuildOptions(
        dtype=options.precision,
        layer_spec=options.layer_spec,
        transformer_engine_keys=transformer_engine_keys,
        local_attention=options.local_attention,
        meta_device=options.meta_device,
        sequence_parallel=sequence_parallel,
        first_stage_layers=options.parallel.first_layers,
        last_stage_layers=options.parallel.last_layers,
        overrides=options.overrides,
    )


def local_huggingface(source: Source, options: StageOptions) -> Path:
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
        source.huggingface, weights=False, trust_remote_code=options.trust_remote_code
    )


def tokenizer(source: Source, options: StageOptions) -> Any:
    """The tokenizer that ``--tokenizer-model`` names, or the source's own."""
    location = options.tokenizer_model
    if not location or not Path(location).is_dir():
        # A checkpoint of ours carries its tokenizer; a hub name is the conf's default.
        location = str(local_huggingface(source, options)) if source.huggingface else location
    return huggingface.load_tokenizer(str(location), trust_remote_code=options.trust_remote_code)


def end_tokens(source: Source, options: StageOptions, tokenizer: Any) -> list[int]:
    """Ids of the tokens that end an answer: the tokenizer's, and those of the generation config."""
    found = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    if source.huggingface is not None:
        path = local_huggingface(source, options) / "generation_config.json"
        if path.is_file():
            stated = files.read_json_object(path).get("eos_token_id")
            found += [stated] if isinstance(stated, int) else list(stated or ())
    return sorted(set(found))
