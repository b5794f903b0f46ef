"""An EAGLE-3 draft -> a Hugging Face folder of its own, as vLLM, SGLang and TensorRT-LLM load it.

ModelOpt's exporter knows the tensors' names (its rules ``LlamaForCausalLMEagle3``) and slices fused
layers. What it lacks is here: it takes the base of the configuration from a hub repository by name,
never writes ``d2t`` (unified_export_megatron.py:919 asks for ``dt2``), and its configuration has
neither the draft's rotary base nor its epsilon. The configuration here comes from the draft alone.

What the engines read, in 2026-11:

- all: ``architectures``, sizes, ``rms_norm_eps``, ``rope_theta``, ``rope_scaling``,
  ``max_position_embeddings``, ``head_dim``, ``draft_vocab_size``, ``tie_word_embeddings``;
- vLLM: ``eagle_aux_hidden_state_layer_ids`` at the top level, where layer i is the *input* of
  layer i, so one more than ModelOpt's and this project's count;
- SGLang: the same name within ``eagle_config``, where i is the *output* of layer i, as here;
- TensorRT-LLM: ``eagle_config`` for the form of the layer; the auxiliary layers are an option of
  the server (``eagle3_layers_to_capture``, counted as here).

The embedding is the target's in all of them. The head is written even where the draft uses the
target's: SGLang would otherwise need ``draft_vocab_size: null``. ``t2d`` is skipped by all three.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from post_training.checkpoints import huggingface
from post_training.common import files
from post_training.common.errors import UsageError
from post_training.common.quiet import quiet
from post_training.drafts.eagle3.draft import LLAMA3

if TYPE_CHECKING:
    import torch
    from megatron.core.transformer import MegatronModule

ARCHITECTURE = "LlamaForCausalLMEagle3"
AUXILIARY_LAYERS = 3  # vLLM and SGLang build `fc` for three
Tensors = dict[str, "torch.Tensor"]


def require_supported(config: Mapping[str, Any], what: str) -> None:
    """Raise UsageError for a draft of a form that no engine has. No torch.

    Args:
        config: as :attr:`post_training.drafts.eagle3.draft.Draft.config`.
        what: to call the draft in the message.
    """
    layers = "eagle_aux_hidden_state_layer_ids"
    reasons = {
        "num_hidden_layers": (config["num_hidden_layers"] != 1, "engines load one layer"),
        layers: (
            len(config[layers]) != AUXILIARY_LAYERS,
            f"vLLM and SGLang read {AUXILIARY_LAYERS} auxiliary layers",
        ),
        "use_last_layernorm": (not config["use_last_layernorm"], "engines apply a last norm"),
        "use_input_layernorm_in_first_layer": (
            not config["use_input_layernorm_in_first_layer"],
            "engines apply a norm to the features",
        ),
        "mlp_bias": (config["mlp_bias"], "SGLang loads no biases"),
    }
    wrong = [(name, reason) for name, (refused, reason) in reasons.items() if refused]
    if wrong:
        raise UsageError(
            f"{what}: {', '.join(f'{name}={config[name]}' for name, _ in wrong)}",
            "; ".join(reason for _, reason in wrong),
            "attach and train a draft with the default form (convert.sh --algorithm eagle3)",
        )


class DraftExporter:
    """A draft on its way to a folder. Every rank of the model takes part in every method.

    Args:
        model: this rank's part of the drafted model, tensor-parallel size 1.
        source: folder with the target's configuration.
        max_position_embeddings: the target's.
    """

    def __init__(
        self, model: MegatronModule, source: Path, max_position_embeddings: int, **options: Any
    ) -> None:
        from post_training.inference import forward

        self.core = forward.unwrap(model)
        self.source = source
        self.config = self.core.eagle_config
        self.dtype: torch.dtype = self.config.params_dtype
        self.max_position_embeddings = max_position_embeddings
        self._options = options
        form = ("use_last_layernorm", "use_input_layernorm_in_first_layer")
        require_supported(
            {
                "num_hidden_layers": self.config.num_layers,
                "mlp_bias": self.config.add_bias_linear,
                "eagle_aux_hidden_state_layer_ids": self.config.eagle_aux_hidden_state_layer_ids,
                **{name: getattr(self.config, name) for name in form},
            },
            "the draft",
        )
        self._require_plain()

    @property
    def module(self) -> Any | None:
        """The draft, on the last pipeline stage."""
        from post_training.drafts.eagle3 import attach as eagle

        return eagle.draft_module(self.core)

    def write(self, folder: Path, max_shard_bytes: int) -> None:
        """Write the tensors (last stage) and ``config.json`` (rank 0) into an empty folder."""
        from post_training.distributed.collectives import on_first_rank
        from post_training.export.folder import write_tensors

        write_tensors(folder, [self.tensors()], max_shard_bytes)
        on_first_rank(lambda: files.write_json(folder / "config.json", self.configuration()))

    def tensors(self) -> Tensors:
        """The draft by ModelOpt's rules, with ``d2t`` and a head; nothing on earlier stages."""
        if self.module is None:
            return {}
        from post_training.export.streaming_exporter import StreamingExporter

        # ModelOpt announces on stdout that an EAGLE-3 layer is twice as wide as others.
        with quiet(stdout=True):
            exporter = StreamingExporter(
                self.core,
                pretrained_model_name_or_path=str(self.source),
                dtype=self.dtype,
                **self._options,
            )
            found: Tensors = exporter.draft(ARCHITECTURE)
        if hasattr(self.module, "d2t"):
            found["d2t"] = self.module.d2t
        if "lm_head.weight" not in found:
            found["lm_head.weight"] = self._head()
        return {name: tensor.detach() for name, tensor in found.items()}

    def reference(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and value of each tensor, cut from the parameters by code of its own.

        megatron-core keeps queries, keys and values in one matrix, group by group: the queries of
        a group, its key, its value. Gate and up projection are one above the other.
        """
        module = self.module
        if module is None:
            return
        [layer] = module.decoder.layers
        attention, mlp = layer.self_attention, layer.mlp
        groups, size = self.config.num_query_groups, self.config.kv_channels
        fused = attention.linear_qkv.weight
        by_group = fused.reshape(groups, -1, size, fused.shape[-1])
        parts = {"q": by_group[:, :-2], "k": by_group[:, -2:-1], "v": by_group[:, -1:]}
        for name, part in parts.items():
            yield f"midlayer.self_attn.{name}_proj.weight", part.reshape(-1, fused.shape[-1])
        half = self.config.ffn_hidden_size
        yield "midlayer.mlp.gate_proj.weight", mlp.linear_fc1.weight[:half]
        yield "midlayer.mlp.up_proj.weight", mlp.linear_fc1.weight[half:]
        yield "midlayer.mlp.down_proj.weight", mlp.linear_fc2.weight
        yield "midlayer.self_attn.o_proj.weight", attention.linear_proj.weight
        yield "midlayer.input_layernorm.weight", module.enorm.weight
        yield "midlayer.hidden_norm.weight", layer.input_layernorm.weight
        yield "midlayer.post_attention_layernorm.weight", layer.pre_mlp_layernorm.weight
        yield "norm.weight", module.decoder.final_layernorm.weight
        yield "fc.weight", module.fc.weight
        own = getattr(module, "eagle_output_layer", None)
        yield "lm_head.weight", self._head() if own is None else own.weight
        if hasattr(module, "d2t"):
            yield "d2t", module.d2t

    def configuration(self) -> dict[str, Any]:
        """Content of ``config.json``; the same on every rank."""
        import transformers

        config = self.config
        layers = list(config.eagle_aux_hidden_state_layer_ids)
        target = huggingface.read_config(self.source)
        scaling = None
        if config.rope_scaling:
            scaling = {**LLAMA3, "factor": config.rope_scaling_factor}
        return {
            "architectures": [ARCHITECTURE],
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": config.hidden_size,
            "intermediate_size": config.ffn_hidden_size,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_attention_heads,
            "num_key_value_heads": config.num_query_groups,
            "head_dim": config.kv_channels,
            "rms_norm_eps": config.layernorm_epsilon,
            "rope_theta": float(config.rotary_base),
            "rope_scaling": scaling,
            "max_position_embeddings": self.max_position_embeddings,
            "attention_bias": False,
            "mlp_bias": False,
            "attention_dropout": 0.0,
            "initializer_range": config.init_method_std,
            "vocab_size": config.vocab_size,
            "draft_vocab_size": config.draft_vocab_size,
            "tie_word_embeddings": False,
            "bos_token_id": target.get("bos_token_id"),
            "eos_token_id": target.get("eos_token_id"),
            "pad_token_id": target.get("pad_token_id"),
            "use_cache": True,
            "torch_dtype": str(self.dtype).removeprefix("torch."),
            "transformers_version": transformers.__version__,
            # vLLM: the input of layer i.
            "eagle_aux_hidden_state_layer_ids": [layer + 1 for layer in layers],
            "eagle_config": {
                # SGLang, and this project: the output of layer i.
                "eagle_aux_hidden_state_layer_ids": layers,
                "use_aux_hidden_state": True,
                "use_input_layernorm_in_first_layer": True,
                "use_last_layernorm": True,
                "use_mtp_layernorm": False,
                "next_layer_regular": True,
                "parallel_draft_step": 1,
                "parallel_draft_heads_num_layers": 1,
            },
        }

    def _head(self) -> torch.Tensor:
        """The target's output layer, as its forward pass uses it."""
        layer = self.core.output_layer
        if self.core.share_embeddings_and_output_weights:
            weight: torch.Tensor = self.core.shared_embedding_or_output_weight()
            return weight
        from post_training.export.fake_quantized import fake_quantized

        return fake_quantized(layer)

    def _require_plain(self) -> None:
        """Raise UsageError, on every rank, for a draft that is quantized or cannot be mapped."""
        from post_training.distributed.collectives import first_failure

        problem = None
        if self.module is not None:
            quantized = [
                name
                for name, each in self.module.named_modules()
                if getattr(getattr(each, "weight_quantizer", None), "is_enabled", False)
            ]
            if quantized:
                problem = f"{len(quantized)} of its layers are quantized, such as {quantized[0]}"
            d2t = getattr(self.module, "d2t", None)
            if d2t is not None and not bool(d2t.any()):
                problem = (
                    f"its d2t was never filled: it would propose the first {len(d2t)} tokens only"
                )
        found = first_failure(problem)
        if found:
            raise UsageError(
                "the draft",
                found,
                "attach the draft after quantizing its target, and train it (eagle3.sh), which "
                "fills d2t from the training data",
            )
