"""From an architecture to a megatron-core model.

The only place that chooses the model class and the layer spec. Weights are not initialized: every
stage loads them.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from post_training.common.errors import UsageError
from post_training.models import engine_kernels, megatron_errors
from post_training.models.architecture import Architecture
from post_training.models.families import registry as families
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
        overrides: further fields of mcore's configuration that say how the model is run.
    """

    dtype: str = "bf16"
    layer_spec: str = "modelopt"
    transformer_engine_keys: bool = True
    local_attention: bool = False
    meta_device: bool = False
    sequence_parallel: bool = False
    overrides: Mapping[str, Any] = field(default_factory=dict)


def transformer_config(architecture: Architecture, options: BuildOptions) -> TransformerConfig:
    """The mcore configuration for the parallel sizes of the groups that are initialised.

    UsageError if mcore refuses the combination; its own reason is quoted.
    """
    import torch
    from megatron.core import parallel_state
    from megatron.core.transformer import MLATransformerConfig, TransformerConfig

    run_time = {
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "context_parallel_size": parallel_state.get_context_parallel_world_size(),
        "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
        "expert_tensor_parallel_size": parallel_state.get_expert_tensor_parallel_world_size(),
        "sequence_parallel": options.sequence_parallel,
        "bf16": options.dtype == "bf16",
        "fp16": options.dtype == "fp16",
        "params_dtype": torch_dtype(options.dtype),
        "pipeline_dtype": torch_dtype(options.dtype),
        # Weights come from a checkpoint: initialising them would only cost time.
        "perform_initialization": False,
        "use_cpu_initialization": options.meta_device or not torch.cuda.is_available(),
        # Fused kernels that need Apex or Transformer Engine; not worth it for evaluation.
        "gradient_accumulation_fusion": False,
        "bias_activation_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        **engine_kernels.possible(options.overrides),
    }
    config_class = TransformerConfig
    if architecture.multi_latent_attention:
        config_class = MLATransformerConfig
        # With multi-latent attention the layers make their own rotary embedding.
        run_time["rotary_base"] = architecture.rotary_base
        run_time["rotary_percent"] = architecture.rotary_percent
        # The flags' default, which is Megatron-LM's and not megatron-core's.
        run_time["q_lora_rank"] = architecture.value("q_lora_rank")
    values = {**architecture.transformer, **run_time}
    with megatron_errors.told(options.overrides):
        config = config_class(**{name: _python_value(name, v) for name, v in values.items()})
    if architecture.yarn is not None:
        # What GPTModel reads from the configuration, which has no such fields. Without the two
        # scales of DeepSeek the attention factor follows from the scaling factor.
        of_gpt = {"mscale": None, "mscale_all_dim": None, **architecture.yarn}
        vars(config).update({f"yarn_{name}": value for name, value in of_gpt.items()})
    return config


def build(
    architecture: Architecture,
    options: BuildOptions,
    *,
    layers: bool = True,
    weights: bool = True,
) -> MegatronModule:
    """This rank's part of the model, on its device, in evaluation mode, weights uninitialized.

    Args:
        layers: False leaves the decoder's layers out, for training from stored features.
        weights: False leaves all weights on the meta device (``parts.materialize``).
    """
    import torch

    from post_training.models import completion, parts

    # Whoever imports or exports weights has built the model before.
    families.register_weight_mapping(architecture)
    if not (layers and weights):
        options = replace(options, meta_device=True)  # the layers then take no memory
    config = transformer_config(architecture, options)
    context = torch.device("meta") if options.meta_device else contextlib.nullcontext()
    with megatron_errors.told(options.overrides), context, _frequencies_on_device():
        model = _MODEL_TYPES[architecture.model_type](architecture, config, options)
    completion.complete(model, architecture)
    if not layers:
        model.decoder.layers = torch.nn.ModuleList()
    if options.meta_device:
        if weights:
            parts.materialize(model)
    elif torch.cuda.is_available():
        model.cuda(torch.cuda.current_device())
    return model.eval()


@contextlib.contextmanager
def _frequencies_on_device() -> Iterator[None]:
    """Compute rotary frequencies on the GPU also of a model that is built on the meta device.

    megatron-core computes them where it initializes weights, and powers on the CPU differ from
    those on the GPU in the last place.
    """
    import torch
    from megatron.core.models.common.embeddings import RotaryEmbedding, YarnRotaryEmbedding

    def on_device(original: Callable[..., None]) -> Callable[..., None]:
        def init(self: Any, *args: Any, **given: Any) -> None:
            original(self, *args, **{**given, "use_cpu_initialization": False})

        return init

    with contextlib.ExitStack() as stack:
        for kind in (RotaryEmbedding, YarnRotaryEmbedding) if torch.cuda.is_available() else ():
            original = kind.__init__
            stack.callback(setattr, kind, "__init__", original)
            kind.__init__ = on_device(original)
        yield


def torch_dtype(name: str) -> torch.dtype:
    """torch's dtype for one of ``DTYPES``."""
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]


def count_parameters(model: MegatronModule) -> int:
    """Parameters of the whole model over all ranks; a replicated or tied one counts once."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import (
        ShardedTensor,
        ShardedTensorFactory,
        is_main_replica,
    )

    from post_training.distributed.collectives import from_all_ranks

    sizes = {id(p): p.numel() for n, p in model.named_parameters() if "quantizer" not in n}
    count = 0
    for entry in nested_values(model.sharded_state_dict()):
        sharded = isinstance(entry, (ShardedTensor, ShardedTensorFactory))
        if sharded and is_main_replica(entry.replica_id):
            count += sizes.pop(id(entry.data), 0)
    return sum(from_all_ranks(count))


def _gpt_model(
    architecture: Architecture, config: TransformerConfig, options: BuildOptions
) -> MegatronModule:
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel

    return GPTModel(
        config=config,
        transformer_layer_spec=_layer_spec(architecture, config, options),
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


def _hybrid_model(
    architecture: Architecture, config: TransformerConfig, options: BuildOptions
) -> MegatronModule:
    if not architecture.hybrid_layer_pattern:
        raise UsageError(
            f"--export-model-type {architecture.model_type}",
            "its layers are those of a pattern, and none is given",
            "give --hybrid-layer-pattern, such as M-M*-, or leave the type of the model out",
        )
    if importlib.util.find_spec("einops") is None:
        raise UsageError(
            "the package einops",
            "megatron-core's Mamba layers need it, and it is not installed",
            "python -m pip install -r requirements.txt",
        )
    from post_training.models import hybrid

    return hybrid.build(architecture, config, options)


# MambaModel is HybridModel's earlier name.
_MODEL_TYPES = {
    "GPTModel": _gpt_model,
    "HybridModel": _hybrid_model,
    "MambaModel": _hybrid_model,
}


def _layer_spec(
    architecture: Architecture, config: TransformerConfig, options: BuildOptions
) -> Any:
    if options.layer_spec == "transformer_engine":
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

        return get_gpt_decoder_block_spec(
            config, use_transformer_engine=True, qk_l2_norm=config.qk_l2_norm
        )
    from megatron.core.post_training.modelopt.gpt.model_specs import get_gpt_modelopt_spec

    spec = get_gpt_modelopt_spec(
        config,
        local_core_attention=options.local_attention,
        remap_te_layernorm=options.transformer_engine_keys,
        qk_l2_norm=config.qk_l2_norm,
    )
    if config.multi_latent_attention and config.q_lora_rank is None:
        from post_training.models.latent_attention import without_query_latent

        without_query_latent(spec)
    if architecture.has_delta_nets:
        from post_training.models import delta_net

        delta_net.replace_attention(spec, config, architecture.value("linear_attention_freq"))
    if not architecture.pre_norms:
        from post_training.models import post_norms

        post_norms.without_pre_norms(spec)
    return spec


def _python_value(name: str, value: Any) -> Any:
    """The Python object for a value as the command line or a manifest gives it."""
    if name == "window_size" and value is not None:
        return tuple(value)
    if not isinstance(value, str):
        return value
    if name == "activation_func":
        import torch.nn.functional as functional
        from megatron.core import activations

        # megatron-core's own: fast_gelu, quick_gelu, squared_relu.
        return getattr(activations, value, None) or getattr(functional, value)
    if name == "attention_backend":
        from megatron.core.transformer.enums import AttnBackend

        return AttnBackend[value]
    # megatron-core takes the router's by name.
    if name.endswith("dtype") and name != "moe_router_dtype" and value in DTYPES:
        return torch_dtype(value)
    return value
