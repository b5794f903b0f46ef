"""What an EAGLE-3 draft is: the configuration that follows the target's, and its record.

A draft is a small decoder that reads hidden states of three layers of the target (the *auxiliary*
layers) and proposes the next tokens; the target then verifies several of them in one pass (Li et
al. 2025, arXiv:2503.01840). ModelOpt builds it (:mod:`post_training.drafts.eagle3.attach`); what it
is made of follows the target here, so that an engine can share embedding, positions and vocabulary.

The entry ``draft`` in the ``run.json`` of a drafted checkpoint is a :class:`Draft`. Nothing here
imports torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypedDict

from post_training.common import forms
from post_training.common.errors import UsageError, suggest
from post_training.config import checks
from post_training.models import architecture_form
from post_training.models.architecture import Architecture

ALGORITHM = "eagle3"
MODULE = "eagle_module"  # the draft in a model; the names of its tensors begin with it
TARGETS = ("hidden_size", "vocab_size")  # sizes that are the target's
DTYPE_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}

# Keys whose other values ModelOpt's draft for megatron-core ignores, or that are not EAGLE-3.
_ONLY: dict[str, Any] = {
    "hidden_act": "silu",
    "position_embedding_type": "rope",
    "attention_dropout": 0.0,
    "use_aux_hidden_state": True,
    "use_mtp_layernorm": False,
    "parallel_draft_step": 1,
}
_POSITIVE = (
    "num_hidden_layers intermediate_size num_attention_heads num_key_value_heads head_dim "
    "rms_norm_eps rope_theta max_position_embeddings initializer_range draft_vocab_size"
).split()
_HINTS = {
    "hidden_size": "it is the target's",
    "vocab_size": "it is the target's; draft_vocab_size is the draft's own",
    "eagle_ttt_steps": "it is the flag --ttt-steps of eagle3.py",
}
# What Llama 3's scaling is called with, in Hugging Face's names; megatron-core takes the factor
# and has the rest built in (rotary_pos_embedding.py).
LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


class _Config(TypedDict):
    """The configuration of a recorded draft, as :func:`configuration` gives it."""

    num_hidden_layers: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_act: str
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any]
    max_position_embeddings: int
    initializer_range: float
    mlp_bias: bool
    attention_bias: bool
    hidden_size: int
    vocab_size: int
    draft_vocab_size: int
    eagle_aux_hidden_state_layer_ids: list[int]
    torch_dtype: Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Draft:
    """A draft as ``run.json`` records it under ``draft``.

    Attributes:
        algorithm: its name in the registry.
        config: resolved configuration, see :func:`configuration`.
        aux_hidden_state_layer_ids: layers of the target, from 0, whose output the draft reads.
        mix_hidden_states: whether training mixes in states of earlier steps (ModelOpt's flag).
        ttt_steps: steps of training-time test.
        offline: whether the checkpoint leaves out the target's layers (``--export-offline-model``).
        trained: training iterations so far.
    """

    algorithm: str
    config: dict[str, Any]
    aux_hidden_state_layer_ids: list[int]
    mix_hidden_states: bool = False
    ttt_steps: int = 3
    offline: bool = False
    trained: int = 0

    @property
    def has_own_vocabulary(self) -> bool:
        """Whether the draft proposes fewer tokens than the target has, through ``d2t``."""
        return bool(self.config["draft_vocab_size"] != self.config["vocab_size"])

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Draft:
        """The draft that a manifest holds; entries of a newer version are left out.

        Raises:
            UsageError: unless it is as :meth:`to_json` gives it.
        """
        what = "the draft in the manifest run.json"
        remedy = "make the checkpoint again with this version"
        found: Draft = forms.parse(content, cls, what, remedy)
        forms.parse(found.config, _Config, f"{what}: its config", remedy)
        return found


def configuration(
    architecture: Architecture,
    overrides: Mapping[str, Any] | None = None,
    dtype: str = "bf16",
    option: str = "--eagle-config",
) -> dict[str, Any]:
    """The configuration of a draft: everything follows the target, ``overrides`` last.

    Raises:
        UsageError: for an unknown key, a value of the wrong type, or one that cannot work.
    """
    given = overrides or {}
    target = architecture.resolved()
    if target["position_embedding_type"] != "rope":
        raise UsageError(
            f"the target's position embedding: {target['position_embedding_type']}",
            "drafts are made with rotary positions (rope)",
            "train a draft for a model with rotary positions",
        )
    kind = (target["rope_parameters"] or {}).get("rope_type")
    if kind in ("dynamic", "longrope"):
        raise UsageError(
            f"the target's rotary positions: {kind}",
            "they depend on the length of the text, which drafted tokens would change",
            "train a draft for a model with other rotary positions",
        )
    if architecture.has_delta_nets:
        raise UsageError(
            "the target's gated delta nets",
            "their states cannot be taken back to before tokens of a draft that were refused",
            "train a draft for a model with attention in every layer",
        )
    if target["multipliers"]:
        raise UsageError(
            "the target's multipliers of embeddings and logits",
            "a draft shares embeddings and output layer, and engines multiply neither for it",
            "train a draft for a model without them",
        )
    base = float(target["rotary_base"])
    scaling = {"rope_type": "default", "rope_theta": base}
    if target["rope_scaling"]:
        scaling = {**LLAMA3, "rope_theta": base, "factor": target["rope_scaling_factor"]}
    # With latent attention the target has no key-value heads of a plain size.
    mla = architecture.multi_latent_attention
    # The names are those of ModelOpt's `eagle_architecture_config` (a test compares them) and of
    # Hugging Face's Llama.
    config = {
        "num_hidden_layers": 1,
        "intermediate_size": target["ffn_hidden_size"],
        "num_attention_heads": target["num_attention_heads"],
        "num_key_value_heads": target["num_attention_heads" if mla else "num_query_groups"],
        "head_dim": target["v_head_dim"] if mla else target["kv_channels"],
        "hidden_act": "silu",
        "rms_norm_eps": float(target["layernorm_epsilon"]),
        "rope_theta": base,
        "rope_scaling": scaling,
        "position_embedding_type": "rope",
        "max_position_embeddings": architecture.max_position_embeddings,
        "initializer_range": 0.02,
        "mlp_bias": False,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "draft_vocab_size": target["vocab_size"],
        "has_lm_head": False,
        "use_input_layernorm_in_first_layer": True,
        "use_last_layernorm": True,
        "use_mtp_layernorm": False,
        "use_aux_hidden_state": True,
        "eagle_aux_hidden_state_layer_ids": aux_layer_ids(target["num_layers"]),
        "parallel_draft_step": 1,
        "parallel_draft_heads_num_layers": 1,
        "torch_dtype": DTYPE_NAMES[dtype],
        **{name: target[name] for name in TARGETS},
    }
    _check_keys(given, config, option)
    config.update(given)
    if "rope_theta" in given and "rope_scaling" not in given:
        config["rope_scaling"] = {**scaling, "rope_theta": config["rope_theta"]}
    _check_values(config, target, option)
    return config


def aux_layer_ids(num_layers: int) -> list[int]:
    """A low, a middle and a high layer, from 0: EAGLE-3's choice, spread out for few layers.

    ModelOpt's default for 6 layers would be two layers (1, 2 and 2 again), which loses a third of
    what the draft reads.
    """
    chosen = [1, num_layers // 2 - 1, num_layers - 4]
    if chosen != sorted(set(chosen)):
        chosen = sorted({0, (num_layers - 2) // 2, num_layers - 2} & set(range(num_layers)))
    return chosen if len(chosen) == 3 else list(range(num_layers))[:3]


def _check_keys(given: Mapping[str, Any], config: Mapping[str, Any], option: str) -> None:
    """Refuse unknown keys, sizes that are not the target's, and JSON types unlike ``config``'s."""
    keys = [key for key in config if key not in TARGETS]
    for key, value in given.items():
        if key in TARGETS and value == config[key]:
            continue
        if key not in keys:
            hint = _HINTS.get(key) or suggest(key, keys) or f"keys: {', '.join(keys)}"
            known = key in TARGETS
            cause = f"it must be the target's, {config[key]}" if known else "unknown key"
            raise UsageError(f"{option} {key}: {value}", cause, hint)
        kind = type(config[key])
        kinds = (int, float) if kind is float else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool):
            names = " or ".join(each.__name__ for each in kinds)
            raise UsageError(
                f"{option} {key}: {json.dumps(value)}",
                f"it is a JSON {type(value).__name__}, and {names} is needed",
                f"give {names}",
            )


def _check_values(config: Mapping[str, Any], target: Mapping[str, Any], option: str) -> None:
    def refuse(key: str, cause: str, remedy: str) -> None:
        raise UsageError(f"{option} {key}: {config[key]}", cause, remedy)

    for key, value in _ONLY.items():
        if config[key] != value:
            refuse(key, f"drafts here have {value!r} only", "leave it out")
    for key in _POSITIVE:
        checks.positive_in_file(f"{option} {key}:", config[key])
    sizes = {key: config[key] for key in _POSITIVE}
    architecture_form.check_sizes(sizes, option, "choose a size that a draft can have")
    if config["torch_dtype"] not in DTYPE_NAMES.values():
        refuse("torch_dtype", "unknown type", f"one of {', '.join(DTYPE_NAMES.values())}")
    if config["attention_bias"] != config["mlp_bias"]:
        refuse("attention_bias", "ModelOpt's draft has one switch for both biases", "set both")
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    if heads % groups:
        refuse("num_key_value_heads", f"it does not divide {heads} heads", "choose a divisor")
    if config["draft_vocab_size"] > target["vocab_size"]:
        refuse("draft_vocab_size", f"the target has {target['vocab_size']} tokens", "choose fewer")
    ids, layers = config["eagle_aux_hidden_state_layer_ids"], target["num_layers"]
    key = "eagle_aux_hidden_state_layer_ids"
    if not ids or not all(type(i) is int and 0 <= i < layers for i in ids):
        refuse(key, f"the target's layers are 0 to {layers - 1}", f"e.g. {aux_layer_ids(layers)}")
    if ids != sorted(set(ids)):
        refuse(key, "they must ascend, each once", f"{sorted(set(ids))}")


def require_exportable(config: Mapping[str, Any], what: str) -> None:
    """Raise UsageError for a draft of a form that no engine has.

    Args:
        config: these keys of :attr:`Draft.config`.
        what: to call the draft in the message.
    """
    layers = "eagle_aux_hidden_state_layer_ids"
    norm = "use_input_layernorm_in_first_layer"
    needed = {
        "num_hidden_layers": (config["num_hidden_layers"] == 1, "engines load one layer"),
        # They build `fc` for three.
        layers: (len(config[layers]) == 3, "vLLM and SGLang read 3 auxiliary layers"),
        "use_last_layernorm": (config["use_last_layernorm"], "engines apply a last norm"),
        norm: (config[norm], "engines apply a norm to the features"),
        "mlp_bias": (not config["mlp_bias"], "SGLang loads no biases"),
    }
    wrong = [(name, reason) for name, (met, reason) in needed.items() if not met]
    if wrong:
        raise UsageError(
            f"{what}: {', '.join(f'{name}={config[name]}' for name, _ in wrong)}",
            "; ".join(reason for _, reason in wrong),
            "attach and train a draft with the default form (convert.sh --algorithm eagle3)",
        )
