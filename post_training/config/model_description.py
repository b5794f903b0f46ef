"""The model's architecture: from a checkpoint or ``config.json``, and from flags. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from post_training.common import inputs
from post_training.common.errors import UsageError
from post_training.config.flags import spelled
from post_training.config.options import StageOptions
from post_training.models import parallel_check, tokenizer_files
from post_training.models.architecture import (
    MLA_FIELDS,
    REQUIRED,
    TRANSFORMER_FIELDS,
    Architecture,
    same,
    show,
)
from post_training.models.families import registry as families


def architecture(
    options: StageOptions,
    huggingface_config: Mapping[str, Any] | None = None,
    manifest: Mapping[str, Any] | None = None,
) -> Architecture:
    """The model's architecture: from the checkpoint where there is one, else from the flags.

    A ``config.json`` or a manifest describes the weights, so its values are taken; a flag (the
    conf) that contradicts it is an error, unless it states the value that a pruned model had
    before (``pruned_from`` of the manifest). What flags leave unsaid is not a contradiction: confs
    of Megatron-LM do not state everything (their Llama 3.2 conf leaves out the factor of its rotary
    scaling).

    UsageError names all contradictions, or the flags that are missing.
    """
    original: Mapping[str, Any] = {}
    if manifest is not None and manifest.get("architecture"):
        with families.values_of(f"run.json of --load {options.load}"):
            found = Architecture.from_json(manifest["architecture"])
            found.resolved()
            if manifest.get("pruned_from"):
                original = Architecture.from_json(manifest["pruned_from"]).resolved()
        named, described = f"the checkpoint of --load {options.load}", "the checkpoint"
        remedy = "name the conf of this model, or the checkpoint of this conf"
    elif huggingface_config is not None:
        found = families.from_huggingface(huggingface_config)
        found.check("config.json")
        if options.build.layer_spec == "transformer_engine" and found.unfusable_norms:
            raise UsageError(
                "--export-default-te-spec",
                "Transformer Engine's layers fuse each norm with the linear layer after it, and "
                f"ModelOpt's importer does not read {found.unfusable_norms} there",
                "leave it out: ModelOpt's layers are the default",
            )
        named, described = f"--pretrained-model-path {options.pretrained_model_path}", "config.json"
        remedy = "name the conf of this model, or the folder of the conf's model"
    else:
        return _from_flags(options)
    wrong = [
        each
        for each in found.contradictions(options.stated)
        if each.name not in original or not same(each.mine, original[each.name])
    ]
    if wrong:
        different = show(wrong, "the conf", described)
        raise UsageError(named, f"it is not the model of the conf: {different}", remedy)
    return found


def check_division(options: StageOptions) -> None:
    """Check that the parallel sizes divide the conf's model, which may not be on this machine.

    A checkpoint (``--load``) may be a pruned form of the conf's model: then the stage checks.
    """
    said = options.stated
    if not options.load and options.states_model:
        stated = Architecture(_transformer_fields(said), said.get("vocab_size", 0), 0)
        stated.check("the conf", "correct it")
        parallel_check.check(stated, options.parallel)


def check_tokenizer(options: StageOptions, *, own: bool = False) -> None:
    """Check a tokenizer folder that is not the model's ``own``, or that too.

    A hub name has no folder; with ``--dry-run`` it may be one of another machine.
    """
    named = options.tokenizer_model
    if not named or (options.dry_run and not Path(named).exists()):
        return
    if own or named != options.pretrained_model_path:
        tokenizer_files.check(named)
    else:
        tokenizer_files.check_growth(Path(named))


def _from_flags(options: StageOptions) -> Architecture:
    said = dict(options.stated)
    missing = [spelled(name) for name in REQUIRED if not said.get(name)]
    if "vocab_size" not in said:
        tokens, _ = _tokens(options)
        if tokens is None:
            missing.append("--padded-vocab-size (or a folder with a tokenizer in TOKENIZER_MODEL)")
        else:
            said["vocab_size"] = padded(tokens, options.vocabulary_multiple)
    if missing:
        raise UsageError(
            f"the model's architecture: no {', '.join(missing)}",
            "there is no config.json or run.json on this machine to take it from, and the flags do "
            "not state it",
            "name a conf (conf/<org>/<model>.sh) or, for auto, a local folder in HF_MODEL_CKPT; or "
            "give these flags",
        )
    transformer = _transformer_fields(said)
    if transformer.get("multi_latent_attention"):
        # Megatron-LM's flag has no default; that of megatron-core's field, 512, is another model.
        transformer.setdefault("q_lora_rank", None)
    own = {n: v for n, v in said.items() if n not in transformer}
    own.setdefault("max_position_embeddings", options.seq_length or 4096)
    own.setdefault("share_embeddings_and_output_weights", True)
    found = Architecture(transformer=transformer, **own)
    found.check("the conf", "correct it")
    return found


def _tokens(options: StageOptions) -> tuple[int | None, bool]:
    """Tokens of the tokenizer, if they are known; whether they are, without having seen it."""
    named = options.tokenizer_model or ""
    found = tokenizer_files.vocabulary(Path(named))
    if found is None and (cached := inputs.cached(named, "tokenizer.json")):
        found = tokenizer_files.vocabulary(cached.parent)
    return (tokenizer_files.published(named), True) if found is None else (found, False)


def assumption(options: StageOptions) -> str | None:
    """What :func:`architecture` assumes about a model that only the flags describe."""
    tokens, assumed = _tokens(options)
    if "vocab_size" in options.stated or tokens is None or not assumed or not options.states_model:
        return None
    size = padded(tokens, options.vocabulary_multiple)
    return (
        f"the tokenizer {options.tokenizer_model} is not on this machine: {tokens:,} tokens are "
        f"assumed, padded to {size:,} (a multiple of {options.vocabulary_multiple:,}); "
        "--padded-vocab-size states another number"
    )


def _transformer_fields(said: Mapping[str, Any]) -> dict[str, Any]:
    return {n: v for n, v in said.items() if n in TRANSFORMER_FIELDS | MLA_FIELDS}


def padded(size: int, multiple: int) -> int:
    """``size`` rounded up to a ``multiple``."""
    return -(-size // multiple) * multiple
