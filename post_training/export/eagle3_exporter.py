"""An EAGLE-3 draft -> a Hugging Face folder of its own, as vLLM, SGLang and TensorRT-LLM load it.

ModelOpt's exporter knows the tensors' names (its rules ``LlamaForCausalLMEagle3``) and slices fused
layers. What it lacks is here: it takes the base of the configuration from a hub repository by name,
never writes ``d2t`` (unified_export_megatron.py:919 asks for ``dt2``), and its configuration has
neither the draft's rotary base nor its epsilon. The configuration here comes from the draft alone.
All calls are collective; the draft itself is on the last pipeline stage.

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

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from megatron.core.transformer import MegatronModule

from post_training.checkpoints import huggingface, loading
from post_training.checkpoints.source import Source
from post_training.common import files
from post_training.common.errors import UsageError
from post_training.common.quiet import quiet
from post_training.config.options import StageOptions
from post_training.distributed.collectives import first_failure, on_first_rank
from post_training.distributed.session import Session
from post_training.drafts.eagle3.draft import LLAMA3, require_exportable
from post_training.drafts.record import SUBFOLDER, draft_of
from post_training.export import eagle3_readback, folder
from post_training.export.fake_quantized import fake_quantized, unpack
from post_training.export.readback import Folder
from post_training.export.streaming_exporter import StreamingExporter
from post_training.inference import forward

logger = logging.getLogger("post_training")

ARCHITECTURE = "LlamaForCausalLMEagle3"


def write(
    model: MegatronModule,
    source: Source,
    options: StageOptions,
    session: Session,
    target: Path,
    *,
    max_shard_bytes: int,
    beside_target: bool = False,
) -> dict[str, Any]:
    """Write a draft into the working folder of ``target`` and verify it. Returns the metrics.

    Args:
        model: this rank's part, at tensor-parallel size 1.
        beside_target: the working folder holds the target already; the draft gets the folder
            :data:`~post_training.drafts.record.SUBFOLDER` in it.

    Raises:
        UsageError: if the draft has no form that engines read, or what was written is not it.
    """
    core = forward.unwrap(model)
    if not hasattr(core, "eagle_config"):
        raise UsageError(f"--load {options.load}", "it has no draft", "name what eagle3.sh saved")
    unpack(model)
    _require_form(core)
    configuration = loading.local_huggingface(source, options)
    target_config = huggingface.read_config(configuration)
    longest = source.architecture.max_position_embeddings
    config = config_json(core.eagle_config, target_config, longest)
    work = on_first_rank(lambda: _begin(target, beside_target))
    tensors = _tensors(core, configuration, options.trust_remote_code)
    folder.write_tensors(work, [tensors], max_shard_bytes)
    on_first_rank(lambda: files.write_json(work / "config.json", config))
    written = Folder(work)
    draft = draft_of(source)
    problems = list(eagle3_readback.differences(written, reference(core)))
    if session.is_main:
        layers = draft.aux_hidden_state_layer_ids if draft else None
        problems += eagle3_readback.problems(written, target_config, layers)
    folder.require_equal(problems, work)
    logger.info("read back: %d tensors equal the draft's", len(written.index))
    if draft is not None and not draft.trained:
        logger.warning("this draft has not been trained: its acceptance length is 1")
    return {
        "tensors_compared": len(written.index),
        "draft_vocab_size": config["draft_vocab_size"],
        "auxiliary_layers": config["eagle_config"]["eagle_aux_hidden_state_layer_ids"],
    }


def _begin(target: Path, beside_target: bool) -> Path:
    """The empty folder for the draft's files."""
    if not beside_target:
        return files.begin(target)
    work = files.incomplete(target) / SUBFOLDER
    work.mkdir()
    return work


def why_not(model: MegatronModule) -> str | None:
    """Why the draft of ``model`` cannot be exported; None if it can. A collective call."""
    try:
        _require_form(forward.unwrap(model))
    except UsageError as error:
        return error.cause
    return None


def _require_form(core: Any) -> None:
    """Raise UsageError, on every rank, for a draft without a form that engines read."""
    config = core.eagle_config
    same = (
        "eagle_aux_hidden_state_layer_ids",
        "use_last_layernorm",
        "use_input_layernorm_in_first_layer",
    )
    named = {name: getattr(config, name) for name in same}
    named |= {"num_hidden_layers": config.num_layers, "mlp_bias": config.add_bias_linear}
    require_exportable(named, "the draft")
    module = core.eagle_module
    problem = None
    if module is not None:
        quantized = [
            name
            for name, each in module.named_modules()
            if getattr(getattr(each, "weight_quantizer", None), "is_enabled", False)
        ]
        if quantized:
            problem = f"{len(quantized)} of its layers are quantized, such as {quantized[0]}"
        d2t = getattr(module, "d2t", None)
        if d2t is not None and not bool(d2t.any()):
            problem = f"its d2t was never filled: it would propose the first {len(d2t)} tokens only"
    found = first_failure(problem)
    if found:
        raise UsageError(
            "the draft",
            found,
            "attach the draft after quantizing its target, and train it (eagle3.sh), which "
            "fills d2t from the training data",
        )


def _tensors(core: Any, configuration: Path, trust_remote_code: bool) -> folder.Tensors:
    """The draft by ModelOpt's rules, with ``d2t`` and a head; nothing on earlier stages."""
    module = core.eagle_module
    if module is None:
        return {}
    # ModelOpt announces on stdout that an EAGLE-3 layer is twice as wide as others.
    with quiet(stdout=True):
        exporter = StreamingExporter(
            core,
            pretrained_model_name_or_path=str(configuration),
            dtype=core.eagle_config.params_dtype,
            trust_remote_code=trust_remote_code,
        )
        found = exporter.draft(ARCHITECTURE)
    if hasattr(module, "d2t"):
        found["d2t"] = module.d2t
    if "lm_head.weight" not in found:
        found["lm_head.weight"] = _target_head(core)
    return found


def reference(core: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and value of each tensor, cut from the parameters by code of its own.

    megatron-core keeps queries, keys and values in one matrix, group by group: the queries of
    a group, its key, its value. Gate and up projection are one above the other.
    """
    module = core.eagle_module
    if module is None:
        return
    [layer] = module.decoder.layers
    attention, mlp = layer.self_attention, layer.mlp
    groups, size = core.eagle_config.num_query_groups, core.eagle_config.kv_channels
    fused = attention.linear_qkv.weight
    by_group = fused.reshape(groups, -1, size, fused.shape[-1])
    parts = {"q": by_group[:, :-2], "k": by_group[:, -2:-1], "v": by_group[:, -1:]}
    for name, part in parts.items():
        yield f"midlayer.self_attn.{name}_proj.weight", part.reshape(-1, fused.shape[-1])
    half = core.eagle_config.ffn_hidden_size
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
    yield "lm_head.weight", _target_head(core) if own is None else own.weight
    if hasattr(module, "d2t"):
        yield "d2t", module.d2t


def _target_head(core: Any) -> torch.Tensor:
    """The target's output layer, as its forward pass uses it."""
    if core.share_embeddings_and_output_weights:
        weight: torch.Tensor = core.shared_embedding_or_output_weight()
        return weight
    return fake_quantized(core.output_layer).to(core.eagle_config.params_dtype)


def config_json(config: Any, target: Mapping[str, Any], longest: int) -> dict[str, Any]:
    """Content of ``config.json``, from ``eagle_config``, the target's content and longest text."""
    layers = list(config.eagle_aux_hidden_state_layer_ids)
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
        "max_position_embeddings": longest,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": config.init_method_std,
        "vocab_size": config.vocab_size,
        "draft_vocab_size": config.draft_vocab_size,
        "tie_word_embeddings": False,
        **{name: target.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        "use_cache": True,
        "torch_dtype": str(config.params_dtype).removeprefix("torch."),
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
