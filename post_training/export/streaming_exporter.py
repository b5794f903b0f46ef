"""ModelOpt's exporter for megatron-core, extended where it falls short; each method says how.

It maps names, slices fused layers and packs weights. What it gives is written and then read back
by :mod:`post_training.export.readback`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any

import modelopt
import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from modelopt.torch.export.model_config import QUANTIZATION_NVFP4, QUANTIZATION_W4A16_NVFP4
from modelopt.torch.export.quant_utils import process_layer_quant_config
from modelopt.torch.export.unified_export_megatron import GPTModelExporter
from modelopt.torch.quantization.nn import SequentialQuantizer

from post_training.export.dividing import Dividing
from post_training.export.fake_quantized import (
    calibrated_scale,
    fake_quantized,
    nvfp4_block_scales,
)
from post_training.export.folder import Tensors
from post_training.export.joining import Joining
from post_training.models import post_norms
from post_training.models.families import registry as families
from post_training.quantization import layer_names, quantizers
from post_training.quantization.formats.base import Linear

# From a linear layer to a tensor of its weight's shape, [out, in].
View = Callable[[Any], torch.Tensor]


class StreamingExporter(GPTModelExporter):
    """ModelOpt's exporter, one layer at a time. Every rank takes part in every method.

    Attributes:
        linears: how each linear of this rank's views is quantized, by its name in the files.
    """

    _view: View | None = None
    _state_dict: Any
    rules: dict[str, Any]

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        """Experts that files hold in one tensor are written one by one where they have scales.

        The original gives all of them the largest scale, which rounds the others' weights again.
        """
        super().__init__(model, *args, **kwargs)
        self.linears: dict[str, Linear] = {}
        own = {n: rule for n, rule in self.rules.items() if n.startswith("quantized_experts.")}
        if own and any(layer_names.is_expert(name) for name, _ in quantizers.enabled(model)):
            names = {n.replace("quantized_", "local_"): rule for n, rule in own.items()}
            self.rules = {**self.rules, **names, "use_packed_local_experts": False}

    def groups(self) -> Iterator[Tensors]:
        """Tensors by Hugging Face name, weights packed by ModelOpt: embedding, each layer, then
        final norm and head."""
        return (found for (found,) in self._groups(None))

    def views(self, *views: View) -> Iterator[list[Tensors]]:
        """The same tensors, with what each view gives for a linear's weight in its place.

        The scales of inputs, keys and values come along, from the calibrated maxima.
        """
        return self._groups(*views)

    def _groups(self, *views: View | None) -> Iterator[list[Tensors]]:
        for write in self._writers():
            found = []
            for self._view in views:
                write()
                found.append(self._joining.tensors(self._dividing.tensors(self._take())))
            yield found

    def _writers(self) -> Iterator[Callable[[], None]]:
        """What puts the tensors of one group into the state dict."""
        model = self.model
        # With a draft the last pipeline stage has a copy of the embedding too.
        if model.pre_process:
            yield lambda: self.rules["word_embeddings"](model.embedding.word_embeddings)
        for layer in model.decoder.layers:
            is_transformer = isinstance(layer, TransformerLayer)
            write = self._get_transformer_layer_state_dict
            write = write if is_transformer else self._get_mamba_layer_state_dict
            yield partial(write, layer, layer.layer_number - 1)
        yield self._write_end

    def _get_transformer_layer_state_dict(self, layer: Any, layer_id: int, **options: Any) -> None:
        """As the original, which knows no norms after attention and MLP."""
        super()._get_transformer_layer_state_dict(layer, layer_id, **options)
        for name, norm in post_norms.of(layer).items():
            self.rules[name](norm, layer_id)

    def _get_gated_delta_net_state_dict(self, layer: Any, layer_id: int, **options: Any) -> None:
        """The original has one linear for all inputs, and a norm that is centred on zero."""
        found = layer.self_attention
        tensors = {
            **{name: getattr(found, name) for name in ("in_proj", "in_proj_ba", "out_proj")},
            "conv1d": found.conv1d.weight,
            **{"A_log": found.A_log, "dt_bias": found.dt_bias, "norm": found.out_norm.weight},
        }
        for name, each in tensors.items():
            self.rules[f"linear_attn.{name}"](each, layer_id)

    def _write_end(self) -> None:
        model = self.model
        for norm in ("final_layernorm", "final_norm"):
            if getattr(model.decoder, norm, None):
                self.rules[norm](getattr(model.decoder, norm))
        if hasattr(model, "output_layer") and not model.share_embeddings_and_output_weights:
            self.rules["output_layer"](model.output_layer)

    def draft(self, architecture: str) -> Tensors:
        """The tensors of an attached draft, by the rules of ``architecture``."""
        self.rules = self.all_rules[architecture]
        self._get_eagle_module_state_dict()
        return self._take()

    def quantization_config(self) -> dict[str, Any] | None:
        """Content of ``hf_quant_config.json`` for the groups that were given.

        None for a model that is not quantized.
        """
        layers = self._gather_layer_config_dict()
        excluded = self._gather_exclude_modules()
        kv_cache = self._gather_kv_cache_dtype()
        if not layers and kv_cache is None:
            return None
        quantization = {"quant_algo": None}
        if layers:
            quantization = process_layer_quant_config(layers)
            quantization["exclude_modules"] = excluded
        quantization["kv_cache_quant_algo"] = kv_cache
        return {
            "producer": {"name": "modelopt", "version": modelopt.__version__},
            "quantization": quantization,
        }

    def _take(self) -> Tensors:
        tensors, self._state_dict = self._state_dict, OrderedDict()
        return self._named(tensors)

    def _named(self, tensors: Tensors) -> Tensors:
        """The tensors by the names that files have."""
        family = families.FAMILIES.get(self.arch)
        return {(family.stored_name(n) if family else n): t for n, t in tensors.items()}

    @cached_property
    def _joining(self) -> Joining:
        family = families.FAMILIES.get(self.arch)
        return Joining(family.joined(vars(self.model.config)) if family else {})

    @cached_property
    def _dividing(self) -> Dividing:
        family = families.FAMILIES.get(self.arch)
        return Dividing(family.divided(vars(self.model.config)) if family else {})

    def _record_layer_quant_config(self, prefix: str, form: Any, *more: Any) -> None:
        """As the original; of a view, how the linear is quantized."""
        for part in self._dividing.modules(self._joining.module(prefix)):
            if self._view is None:
                super()._record_layer_quant_config(part, form, *more)
            elif form is not None:
                (name,) = self._named({f"{part}weight": torch.empty(0)})
                self.linears[name.removesuffix(".weight")] = form

    def _record_excluded_module(self, prefix: str) -> None:
        """Of experts in one tensor, engines ask for the layer that has them, ``experts``."""
        family = families.FAMILIES.get(self.arch)
        for whole in family.stacked[:2] if family and family.stacked else ():
            if prefix.endswith(f".{whole}"):
                super()._record_excluded_module(f"{prefix.removesuffix(whole)}experts*")
        for part in self._dividing.modules(self._joining.module(prefix)):
            super()._record_excluded_module(part)

    def _populate_rule_book(self) -> dict[str, Any]:
        """KV scales get the names that ModelOpt's Hugging Face path writes.

        vLLM and SGLang read ``k_proj.k_scale`` as well as ``k_scale``, TensorRT-LLM the former
        alone.
        """
        rules = super()._populate_rule_book()
        names = {"k_scale_name": "k_proj.k_scale", "v_scale_name": "v_proj.v_scale"}
        for rule in rules.values():
            if "core_attention" in rule:
                rule["core_attention"] = partial(rule["core_attention"], **names)
        return rules

    def _name_remapping(self, module: Any, prefix: str, **options: Any) -> None:
        """As the original, but a parameter of its own (attention sinks, the decays of Mamba layers;
        they are float32 in the model) is written in the dtype of the others, where that does not
        change it."""
        if isinstance(module, torch.Tensor) and module.dim() == 2:
            # A linear by its parameter alone: the gate of shared experts.
            linear = torch.nn.Linear(0, 0, bias=False, device="meta")
            linear.weight = torch.nn.Parameter(module.detach(), requires_grad=False)
            module, prefix = linear, prefix.removesuffix("weight")
        if isinstance(module, torch.Tensor):
            exact, rounded = module.detach(), module.detach().to(self.dtype)
            keeps = self._view is None and torch.equal(rounded.to(exact.dtype), exact)
            module = rounded if keeps else exact.float()
            if module.dim() > 1:  # kernels of a convolution
                self._record_excluded_module(prefix.removesuffix("weight"))
        super()._name_remapping(module, prefix, **options)

    def _get_weight_bias(
        self, module: Any, dtype: Any = None, name_to_value: Tensors | None = None
    ) -> Tensors:
        """As the original, but tensors stay on the GPU, where packing is fast, and a router's bias
        stays float32, as published files have it."""
        found = {} if name_to_value is None else name_to_value
        for name in ("weight", "bias", "expert_bias"):
            value = getattr(module, name, None)
            if name == "weight" and value is not None and self._view is not None:
                found[name] = value.detach()  # the view takes its place
            elif value is not None and value.numel() > 0:
                # A router's bias decides between scores that differ by less than bf16's rounding.
                found[name] = value.detach().to(torch.float32 if name == "expert_bias" else dtype)
        return found

    def _get_quantized_state(
        self, module: Any, dtype: Any = None, prefix: str = ""
    ) -> tuple[Tensors, Any, int]:
        """Packs the weights that the forward pass used, so that what was scored is exported.

        The original divides the unrounded weight in bf16, which rounds twice; and any other
        order of multiplying and dividing than the kernel's rounds weights that lie between
        two codes the other way. Fake-quantized weights lie on their codes.
        """
        if self._view is not None:
            state = self._get_weight_bias(module, torch.float32)
            if "weight" in state:
                state["weight"] = self._view(module)
            scales = {"input_scale": calibrated_scale(getattr(module, "input_quantizer", None))}
            of_weight = getattr(module, "weight_quantizer", None)
            if isinstance(of_weight, SequentialQuantizer):
                scales["weight_scale_2"] = calibrated_scale(of_weight[-1])
            state.update({name: each for name, each in scales.items() if each is not None})
            return state, quantizers.linear_of(module), 0
        state, quantization, block_size = super()._get_quantized_state(module, dtype, prefix)
        if "weight_scale" in state:
            state["weight"] = fake_quantized(module)
        if quantization in (QUANTIZATION_NVFP4, QUANTIZATION_W4A16_NVFP4):
            state["weight_scale"] = nvfp4_block_scales(
                module.weight_quantizer,
                state["weight"],
                state["weight_scale"],
                state["weight_scale_2"],
            )
        return state, quantization, block_size

    def _get_weight_scales(self, state: Any, quantization: str | None) -> tuple[Any, Any]:
        """As the original; of a view the scales stay among what is written beside each part."""
        found: tuple[Any, Any] = (None, None)
        return found if self._view is not None else super()._get_weight_scales(state, quantization)

    def _self_attention_scaling(self, module: Any, prefix: str, **options: Any) -> None:
        if self._view is None:
            super()._self_attention_scaling(module, prefix, **options)
            return
        for kind in ("k", "v"):
            scale = calibrated_scale(getattr(module, f"{kind}_bmm_quantizer", None))
            if scale is not None:
                self._state_dict[prefix + options[f"{kind}_scale_name"]] = scale
