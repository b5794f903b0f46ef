"""The families that are known, and what is asked of whichever fits. Nothing here imports torch."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from post_training.common.errors import UsageError, suggest
from post_training.models import quantized_files
from post_training.models.architecture import Architecture
from post_training.models.families.base import Family

Joined = Mapping[str, Mapping[str, int]]
Divided = Mapping[str, Mapping[str, Sequence[int]]]
# One row a file of this folder; each file has a tuple FAMILIES.
_FILES = (
    "deepseek",
    "ernie",
    "gemma",
    "glm",
    "glm_moe",
    "gpt_oss",
    "granite",
    "llama",
    "llama4",
    "minimax",
    "ministral",
    "mistral",
    "mixtral",
    "nemotron",
    "nemotron_h",
    "olmo",
    "phi3",
    "qwen",
    "qwen35",
    "qwen_moe",
    "qwen_next",
    "seed_oss",
    "smollm",
)
FAMILIES: dict[str, Family] = {
    family.architecture: family
    for name in _FILES
    for family in importlib.import_module(f"{__package__}.{name}").FAMILIES
}
_INDEXER = (
    "its attention chooses tokens by an indexer: ModelOpt reads no indexer's weights, and "
    "megatron-core keeps no cache for it"
)
# Architectures near to a known one that megatron-core 0.19's layers do not compute.
_NOT_COMPUTED = {
    "Gemma2ForCausalLM": "its attention scores and logits are capped",
    "Gemma3ForConditionalGeneration": "tokens of an image attend to each other in both directions; "
    "its text model alone (Gemma3ForCausalLM) is converted",
    "DeepseekV32ForCausalLM": _INDEXER,
    "GlmMoeDsaForCausalLM": _INDEXER,
    "GraniteMoeHybridForCausalLM": "a layer has a Mamba or attention part, and an MLP or experts, "
    "times constant factors; layers of megatron-core's hybrid have one part",
}
# What a model may have beyond a dense decoder, and the flags that state it.
PARTS = {
    "experts": ("num_moe_experts",),
    "multi-latent attention": ("multi_latent_attention",),
    "Mamba layers": ("hybrid_layer_pattern", "is_hybrid_model"),
    "gated delta nets": ("linear_attention_freq",),
}
# A model of an unknown architecture keeps the keys that most decoders share.
_ANY_DECODER = Family(name="decoder", architecture="", defaults={}, tiny={})


@contextlib.contextmanager
def values_of(file: str) -> Iterator[None]:
    """Turn what reading values of another kind than expected raises into a UsageError."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UsageError(
            file,
            f"a value is missing, or is not what it has to be: {type(error).__name__}: {error}",
            "compare it with the original",
        ) from error


def from_huggingface(config: Mapping[str, Any]) -> Architecture:
    """The architecture that the content of a ``config.json`` describes.

    UsageError names an unknown architecture, weights that are quantized in a way that is not read,
    or a value that megatron-core cannot represent.
    """
    with values_of("config.json"):
        name = _architecture(config)
        if name in _NOT_COMPUTED:
            raise UsageError(
                f"config.json: architectures = ['{name}']",
                _NOT_COMPUTED[name],
                f"convert a model of another architecture: {', '.join(sorted(FAMILIES))}",
            )
        if name not in FAMILIES:
            raise UsageError(
                f"config.json: architectures = {config.get('architectures')!r}",
                f"known are {', '.join(sorted(FAMILIES))}",
                _misspelt(str(name)) or "convert a model of one of the known architectures",
            )
        refuse_quantized(config)
        return FAMILIES[name].read(config)


def with_shape(
    config: Mapping[str, Any], values: Mapping[str, Any], kept_layers: Sequence[int] | None = None
) -> dict[str, Any]:
    """``config`` of plain weights with the sizes of a pruned model; :meth:`Family.with_shape`."""
    family = of(config)
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    if family.prefix:
        return {**plain, "text_config": family.with_shape(family.text(plain), values, kept_layers)}
    return family.with_shape(plain, values, kept_layers)


def unconvertible(stated: Mapping[str, Any]) -> str | None:
    """Why no family reads a model that flags describe; None if one may.

    For a hub name, whose ``config.json`` is not here: refused before the download, not after it.
    """
    found = [part for part, flags in PARTS.items() if any(stated.get(flag) for flag in flags)]
    if any(family.parts.issuperset(found) for family in FAMILIES.values()):
        return None
    return f"it has {' and '.join(found)}, and only {', '.join(sorted(FAMILIES))} are converted yet"


def register_weight_mapping(architecture: Architecture) -> None:
    """Add a family's rules for weights to the tables of ModelOpt's importer and exporter."""
    name = architecture.huggingface_architecture or ""
    mapping = FAMILIES[name].weight_mapping() if name in FAMILIES else None
    if mapping is not None:
        from modelopt.torch.export.plugins import mcore_common

        mcore_common.all_mcore_hf_import_mapping[name] = dict(mapping.importing)
        mcore_common.all_mcore_hf_export_mapping[name] = dict(mapping.exporting)


def family_of(architecture: Architecture) -> Family:
    """Its family; one that refuses nothing for a model of an unknown architecture."""
    return FAMILIES.get(architecture.huggingface_architecture or "", _ANY_DECODER)


def of(config: Mapping[str, Any]) -> Family:
    """The family of a ``config.json``; one that refuses nothing for an unknown architecture."""
    return FAMILIES.get(_architecture(config) or "", _ANY_DECODER)


def is_carried(config: Mapping[str, Any], name: str) -> bool:
    """Whether a tensor of the files travels beside the model; see :meth:`Family.is_carried`."""
    return of(config).is_carried(config, name)


def rearranged(architecture: Architecture) -> tuple[Joined, Divided]:
    """Linear layers of the files that hold several of ModelOpt's, or parts of them.

    See :meth:`Family.joined` and :meth:`Family.divided`.
    """
    family, values = family_of(architecture), architecture.resolved()
    return family.joined(values), family.divided(values)


def refuse_quantized(config: Mapping[str, Any], source: str = "config.json") -> None:
    """Raise UsageError if ``config`` describes quantized weights that are not read."""
    found = config.get("quantization_config") or config.get("compression_config")
    with values_of(source):
        quantized_files.refuse_unreadable(found or {}, source)


def _misspelt(name: str) -> str:
    """A hint for a known name that is misspelt; empty for the name of another model.

    Names of different models are alike ("Llama4ForCausalLM" and "LlamaForCausalLM"), so what comes
    before "For" must be the same.
    """
    model = name.lower().partition("for")[0]
    return suggest(
        name, [known for known in FAMILIES if known.lower().partition("for")[0] == model]
    )


def _architecture(config: Mapping[str, Any]) -> str | None:
    return next(iter(config.get("architectures") or ()), None)
