"""From an :class:`~post_training.models.architecture.Architecture` to a megatron-core model.

The only place that chooses the model class and the layer spec. Weights are not initialized: every
stage loads them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from post_training.common.errors import UsageError
from post_training.models import families
from post_training.models.architecture import Architecture
from post_training.models.transformer_fields import DTYPES

if TYPE_CHECKING:
    import torch
    from megatron.core.transformer import MegatronModule, TransformerConfig


@dataclass(frozen=True)
class BuildOptions:
    """Run-time choices that are not architecture.

    Attributes:
        dtype: of parameters and activations, one of ``DTYPES``.
        layer_spec: ``modelopt`` (mcore's linears, which ModelOpt quantizes: the default) or
            ``transformer_engine`` (fused norms: pruning, and quantization of TE linears).
        transformer_engine_keys: name norms in checkpoints as the fused Transformer Engine spec
            does, which is what Megatron-LM writes; False reads checkpoints of unfused specs.
        local_attention: mcore's own attention in place of Transformer Engine's.
        meta_device: build on the meta device and materialize afterwards.
        sequence_parallel: split activations over the tensor-parallel ranks between linears.
        first_stage_layers, last_stage_layers: layers on the first and last pipeline stage, when
            the split is uneven.
        overrides: further fields of mcore's configuration that say how the model is run.
    """

    dtype: str = "bf16"
    layer_spec: str = "modelopt"
    transformer_engine_keys: bool = True
    local_attention: bool = False
    meta_device: bool = False
    sequence_parallel: bool = False
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)


def transformer_config(architecture: Architecture, options: BuildOptions) -> TransformerConfig:
    """The mcore configuration for the parallel sizes of the groups that are initialised.

    Raises:
        UsageError: if mcore refuses the combination; its own reason is quoted.
    """
    import torch
    from megatron.core import parallel_state
    from megatron.core.transformer import MLATransformerConfig, TransformerConfig

    config_class = TransformerConfig
    if architecture.transformer.get("multi_latent_attention"):
        config_class = MLATransformerConfig
    on_cpu = not torch.cuda.is_available()
    run_time = {
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "context_parallel_size": parallel_state.get_context_parallel_world_size(),
        "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
        "expert_tensor_parallel_size": parallel_state.get_expert_tensor_parallel_world_size(),
        "sequence_parallel": options.sequence_parallel,
        "num_layers_in_first_pipeline_stage": options.first_stage_layers,
        "num_layers_in_last_pipeline_stage": options.last_stage_layers,
        "bf16": options.dtype == "bf16",
        "fp16": options.dtype == "fp16",
        "params_dtype": torch_dtype(options.dtype),
        "pipeline_dtype": torch_dtype(options.dtype),
        # Weights come from a checkpoint: initialising them would only cost time.
        "perform_initialization": False,
        "use_cpu_initialization": on_cpu or options.meta_device,
        # Fused kernels that need Apex or Transformer Engine; not worth it for evaluation.
        "gradient_accumulation_fusion": False,
        "bias_activation_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        **{name: _python_value(name, value) for name, value in options.overrides.items()},
    }
    if config_class is MLATransformerConfig:
        # With multi-latent attention the layers make their own rotary embedding.
        run_time["rotary_base"] = architecture.rotary_base
        run_time["rotary_percent"] = architecture.rotary_percent
    known = {each.name for each in fields(config_class)}
    architectural = {
        name: _python_value(name, value) for name, value in architecture.transformer.items()
    }
    unknown = sorted(set(architectural) - known)
    if unknown:
        raise UsageError(
            f"architecture fields {', '.join(unknown)}",
            f"{config_class.__name__} of the installed megatron-core has none of these names",
            "use the megatron-core version that requirements.txt names",
        )
    try:
        return config_class(**{**architectural, **run_time})
    except (AssertionError, ValueError) as error:
        raise UsageError(
            "the model configuration", f"megatron-core refuses it: {error}", "change those values"
        ) from error


def build(
    architecture: Architecture, options: BuildOptions, *, layers: bool = True
) -> MegatronModule:
    """This rank's part of the model, on its device, in evaluation mode, weights uninitialized.

    Args:
        architecture: what it is.
        options: how it is run.
        layers: False leaves the decoder's layers out, for training from stored features.
    """
    import torch

    # Whoever imports or exports weights has built the model before.
    families.register_weight_mapping(architecture)
    if not layers:
        options = replace(options, meta_device=True)  # the layers then take no memory
    config = transformer_config(architecture, options)
    context = torch.device("meta") if options.meta_device else contextlib.nullcontext()
    with context:
        model = _MODEL_TYPES[architecture.model_type](architecture, config, options)
    if not layers:
        model.decoder.layers = torch.nn.ModuleList()
    if options.meta_device:
        _materialize(model)
    elif torch.cuda.is_available():
        model.cuda(torch.cuda.current_device())
    return model.eval()


def torch_dtype(name: str) -> torch.dtype:
    """torch's dtype for one of ``DTYPES``."""
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]


def count_parameters(model: MegatronModule) -> int:
    """Parameters of the whole model over all ranks; a replicated or tied one counts once."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    from post_training.distributed.collectives import from_all_ranks

    names = {name for name, _ in model.named_parameters()}
    count = 0
    seen = set()
    for name, entry in _flatten(model.sharded_state_dict()):
        if not isinstance(entry, (ShardedTensor, ShardedTensorFactory)):
            continue
        replica = entry.replica_id
        is_main = not any(replica) if isinstance(replica, tuple) else replica == 0
        if not is_main or "quantizer" in name or id(entry.data) in seen:
            continue
        if name in names or isinstance(entry, ShardedTensorFactory) or _is_norm_alias(name):
            seen.add(id(entry.data))
            count += entry.data.numel()
    return sum(from_all_ranks(count))


def _is_norm_alias(name: str) -> bool:
    return name.endswith("layer_norm_weight") or name.endswith("layer_norm_bias")


def _flatten(state: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(state, dict):
        for name, entry in state.items():
            yield from _flatten(entry, str(name))
    else:
        yield prefix, state


def _gpt_model(
    architecture: Architecture, config: TransformerConfig, options: BuildOptions
) -> MegatronModule:
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel

    return GPTModel(
        config=config,
        transformer_layer_spec=_layer_spec(config, options),
        vocab_size=architecture.vocab_size,
        max_sequence_length=architecture.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        # Logits stay split over the tensor-parallel ranks; callers gather them where needed.
        parallel_output=True,
        share_embeddings_and_output_weights=architecture.share_embeddings_and_output_weights,
        position_embedding_type=architecture.position_embedding_type,
        rotary_percent=architecture.rotary_percent,
        rotary_base=architecture.rotary_base,
        rope_scaling=architecture.rope_scaling,
        rope_scaling_factor=architecture.rope_scaling_factor,
    )


# HybridModel replaces GPTModel in a later megatron-core and serves Mamba layers: add it here.
_MODEL_TYPES = {"GPTModel": _gpt_model}


def _layer_spec(config: TransformerConfig, options: BuildOptions) -> Any:
    if options.layer_spec == "transformer_engine":
        from megatron.core.models.gpt.gpt_layer_specs import (
            get_gpt_decoder_block_spec,
            get_gpt_layer_with_transformer_engine_spec,
        )

        if config.num_moe_experts:
            return get_gpt_decoder_block_spec(config, use_transformer_engine=True)
        return get_gpt_layer_with_transformer_engine_spec(
            qk_layernorm=config.qk_layernorm,
            multi_latent_attention=config.multi_latent_attention,
        )
    from megatron.core.post_training.modelopt.gpt.model_specs import get_gpt_modelopt_spec

    return get_gpt_modelopt_spec(
        config,
        local_core_attention=options.local_attention,
        remap_te_layernorm=options.transformer_engine_keys,
        qk_l2_norm=getattr(config, "qk_l2_norm", False),
    )


def _materialize(model: torch.nn.Module) -> None:
    """Allocate every meta tensor on this rank's device, uninitialized.

    Attributes that mcore puts on parameters (``tensor_model_parallel`` and so on) are kept, which
    ``Module.to_empty`` would drop. Tied parameters stay tied.
    """
    import torch

    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    made: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in made:
                new = torch.nn.Parameter(
                    parameter.data.new_empty(parameter.shape, device=device)
                    if parameter.is_meta
                    else parameter.data.to(device),
                    requires_grad=parameter.requires_grad,
                )
                new.__dict__.update(parameter.__dict__)
                made[id(parameter)] = new
            module.register_parameter(name, made[id(parameter)])
        for name, buffer in list(module.named_buffers(recurse=False)):
            new_buffer = torch.empty_like(buffer, device=device) if buffer.is_meta else buffer
            setattr(module, name, new_buffer.to(device))


def _python_value(name: str, value: Any) -> Any:
    """The Python object for a value as the command line or a manifest gives it."""
    if name == "activation_func" and isinstance(value, str):
        import torch.nn.functional as functional
        from megatron.core.activations import fast_gelu, quick_gelu, squared_relu

        known = {
            "silu": functional.silu,
            "gelu": functional.gelu,
            "relu": functional.relu,
            "quick_gelu": quick_gelu,
            "fast_gelu": fast_gelu,
            "squared_relu": squared_relu,
        }
        if value not in known:
            raise UsageError(
                f"activation_func {value}", "it has no megatron-core function", f"use {list(known)}"
            )
        return known[value]
    if isinstance(value, str) and name.endswith("dtype") and value in DTYPES:
        return torch_dtype(value)
    if name == "attention_backend":
        from megatron.core.transformer.enums import AttnBackend

        return AttnBackend[value]
    return value
