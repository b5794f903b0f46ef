"""Read an exported draft as an engine would, with code that shares nothing with the exporter.

Only torch and safetensors are used, no ModelOpt and no megatron-core. What must be there follows
from ``config.json`` alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from post_training.export.readback import Folder

_STORED = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_REQUIRED = (
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "rms_norm_eps", "rope_theta", "max_position_embeddings", "vocab_size"),
    *("draft_vocab_size", "torch_dtype"),
)


def problems(folder: Folder, target: Mapping[str, Any], layers: Iterable[int] | None) -> list[str]:
    """Everything about configuration, names, shapes, dtypes and ``d2t`` that is not right.

    Args:
        folder: an exported draft.
        target: ``config.json`` of the target; positions and vocabulary must agree.
        layers: the auxiliary layers, from 0, that the draft was trained with, if known.
    """
    config = folder.config
    missing = [name for name in _REQUIRED if config.get(name) is None]
    if missing:
        return [f"config.json has no {', '.join(missing)}"]
    found = list(_configuration_problems(config, target, layers))
    expected = dict(_expected(config))
    stored = _STORED[config["torch_dtype"]]
    for name, shape in expected.items():
        entry = folder.index.get(name)
        dtype = "I64" if name == "d2t" else stored
        if entry is None:
            found.append(f"{name} is missing")
        elif entry.shape != shape:
            found.append(f"{name} has shape {entry.shape}, config.json says {shape}")
        elif entry.dtype != dtype:
            found.append(f"{name} is stored as {entry.dtype} instead of {dtype}")
    found += [f"{name} is no tensor of a draft" for name in folder.index if name not in expected]
    if "d2t" in expected and "d2t" in folder.index:
        found += _vocabulary_problems(folder.tensor("d2t"), config["vocab_size"])
    return found


def differences(folder: Folder, reference: Iterable[tuple[str, torch.Tensor]]) -> Iterator[str]:
    """Tensors that are not the model's, bit for bit in the stored dtype."""
    for name, wanted in reference:
        if name not in folder.index:
            yield f"{name} is missing"
            continue
        actual = folder.tensor(name)
        if not torch.equal(actual, wanted.detach().cpu().to(actual.dtype)):
            yield f"{name} is not the model's"


def _expected(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each tensor that an engine reads."""
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    features = hidden * len(config["eagle_config"]["eagle_aux_hidden_state_layer_ids"])
    yield "fc.weight", (hidden, features)
    for name in ("input_layernorm", "hidden_norm", "post_attention_layernorm"):
        yield f"midlayer.{name}.weight", (hidden,)
    # The layer reads the token's embedding beside the features.
    for name, size in (("q", queries), ("k", keys), ("v", keys)):
        yield f"midlayer.self_attn.{name}_proj.weight", (size, 2 * hidden)
    yield "midlayer.self_attn.o_proj.weight", (hidden, queries)
    yield "midlayer.mlp.gate_proj.weight", (ffn, hidden)
    yield "midlayer.mlp.up_proj.weight", (ffn, hidden)
    yield "midlayer.mlp.down_proj.weight", (hidden, ffn)
    yield "norm.weight", (hidden,)
    yield "lm_head.weight", (config["draft_vocab_size"], hidden)
    if config["draft_vocab_size"] != config["vocab_size"]:
        yield "d2t", (config["draft_vocab_size"],)


def _configuration_problems(
    config: Mapping[str, Any], target: Mapping[str, Any], layers: Iterable[int] | None
) -> Iterator[str]:
    if config.get("architectures") != ["LlamaForCausalLMEagle3"]:
        yield f"architectures is {config.get('architectures')}"
    nested = config["eagle_config"]["eagle_aux_hidden_state_layer_ids"]
    above = config.get("eagle_aux_hidden_state_layer_ids")
    if above != [layer + 1 for layer in nested]:
        yield f"eagle_aux_hidden_state_layer_ids is {above} at the top and {nested} within"
    if layers is not None and nested != list(layers):
        yield f"eagle_config names the layers {nested}, the draft was trained with {layers}"
    count = target["num_hidden_layers"]
    if not all(0 <= layer < count for layer in nested):
        yield f"auxiliary layers {nested} of a target with {count} layers"
    for name in ("hidden_size", "vocab_size", "max_position_embeddings"):
        if config[name] != target[name]:
            yield f"{name} is {config[name]}, the target's is {target[name]}"


def _vocabulary_problems(offsets: torch.Tensor, vocabulary: int) -> Iterator[str]:
    """``d2t[t] + t`` are distinct tokens of the target."""
    tokens = offsets + torch.arange(len(offsets))
    if int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary:
        yield f"d2t leads to tokens outside 0 to {vocabulary - 1}"
    if len(tokens.unique()) < len(tokens):
        yield "d2t leads to a token twice"
