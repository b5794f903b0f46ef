"""ModelOpt's exporter for megatron-core, extended where it falls short; each method says how."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from modelopt.torch.export.model_config import QUANTIZATION_NVFP4, QUANTIZATION_W4A16_NVFP4
from modelopt.torch.export.unified_export_megatron import GPTModelExporter

from post_training.export.fake_quantized import (
    calibrated_scale,
    fake_quantized,
    nvfp4_block_scales,
)
from post_training.export.shards import Tensors


class StreamingExporter(GPTModelExporter):
    """ModelOpt's exporter, one layer at a time."""

    reference = False
    _state_dict: Any

    def groups(self) -> Iterator[Tensors]:
        """Tensors by Hugging Face name: embedding, each layer, then final norm and head."""
        model = self.model
        # With a draft the last pipeline stage has a copy of the embedding too.
        if model.pre_process:
            self.rules["word_embeddings"](model.embedding.word_embeddings)
            yield self._take()
        for layer in model.decoder.layers:
            number = layer.layer_number - 1
            if isinstance(layer, TransformerLayer):
                self._get_transformer_layer_state_dict(layer, number)
            else:
                self._get_mamba_layer_state_dict(layer, number)
            yield self._take()
        if getattr(model.decoder, "final_layernorm", None):
            self.rules["final_layernorm"](model.decoder.final_layernorm)
        if getattr(model.decoder, "final_norm", None):
            self.rules["final_norm"](model.decoder.final_norm)
        if hasattr(model, "output_layer") and not model.share_embeddings_and_output_weights:
            self.rules["output_layer"](model.output_layer)
        yield self._take()

    def draft(self, architecture: str) -> Tensors:
        """The tensors of an attached draft, by the rules of ``architecture``."""
        self.rules = self.all_rules[architecture]
        self._get_eagle_module_state_dict()
        return self._take()

    def _take(self) -> Tensors:
        tensors, self._state_dict = dict(self._state_dict), OrderedDict()
        return tensors

    def _populate_rule_book(self) -> dict[str, Any]:
        """KV scales get the names that ModelOpt's Hugging Face path writes.

        vLLM and SGLang read ``k_proj.k_scale`` as well as ``k_scale``, TensorRT-LLM the former
        alone.
        """
        rules = super()._populate_rule_book()
        for rule in rules.values():
            if "core_attention" in rule:
                scaling = rule["core_attention"]
                rule["core_attention"] = lambda module, *where, _rule=scaling, **options: _rule(
                    module,
                    *where,
                    **{
                        "k_scale_name": "k_proj.k_scale",
                        "v_scale_name": "v_proj.v_scale",
                        **options,
                    },
                )
        return rules

    def _get_weight_bias(
        self, module: Any, dtype: Any = None, name_to_value: Tensors | None = None
    ) -> Tensors:
        """As the original, but tensors stay on the GPU, where packing is fast."""
        found = {} if name_to_value is None else name_to_value
        for name in ("weight", "bias", "expert_bias"):
            value = getattr(module, name, None)
            if value is not None and value.numel() > 0:
                found[name] = value.detach().to(dtype)
        return found

    def _get_quantized_state(
        self, module: Any, dtype: Any = None, prefix: str = ""
    ) -> tuple[Tensors, str | None, int]:
        """Packs the weights that the forward pass used, so that what was scored is exported.

        The original divides the unrounded weight in bf16, which rounds twice; and any other
        order of multiplying and dividing than the kernel's rounds weights that lie between
        two codes the other way. Fake-quantized weights lie on their codes.
        """
        if self.reference:
            state = self._get_weight_bias(module, torch.float32)
            if "weight" in state:
                state["weight"] = fake_quantized(module).float()
            scale = calibrated_scale(getattr(module, "input_quantizer", None))
            if scale is not None:
                state["input_scale"] = scale
            return state, None, 0
        state, quantization, block_size = super()._get_quantized_state(module, dtype, prefix)
        if "weight_scale" in state:
            state["weight"] = fake_quantized(module).float()
        if quantization in (QUANTIZATION_NVFP4, QUANTIZATION_W4A16_NVFP4):
            state["weight_scale"] = nvfp4_block_scales(
                module.weight_quantizer,
                state["weight"],
                state["weight_scale"],
                state["weight_scale_2"],
            )
        return state, quantization, block_size

    def _self_attention_scaling(self, module: Any, prefix: str, **options: Any) -> None:
        if not self.reference:
            super()._self_attention_scaling(module, prefix, **options)
            return
        for kind in ("k", "v"):
            scale = calibrated_scale(getattr(module, f"{kind}_bmm_quantizer", None))
            if scale is not None:
                self._state_dict[prefix + options[f"{kind}_scale_name"]] = scale
