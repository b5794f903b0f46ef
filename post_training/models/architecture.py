"""What a model is: the values that decide its tensors and its forward pass.

An :class:`Architecture` comes from flags, from the manifest of a checkpoint or from a Hugging Face
``config.json`` (``config/model_description.py``). It is plain JSON and says nothing about how the
model is run: parallel sizes, precision and kernels are elsewhere. No torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

from post_training.common import forms
from post_training.common.errors import UsageError
from post_training.models import architecture_form, transformer_fields

# Fields of TransformerConfig that belong to the model. All others say how it is run or trained.
TRANSFORMER_FIELDS = frozenset(
    """
    num_layers mtp_num_layers mtp_use_repeated_layer mtp_hybrid_override_pattern
    hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels
    softmax_scale softmax_type apply_residual_connection_post_layernorm
    normalization layernorm_epsilon layernorm_zero_centered_gamma
    add_bias_linear add_qkv_bias qk_layernorm qk_l2_norm attention_output_gate
    gated_linear_unit activation_func glu_linear_offset activation_func_clamp_value
    rotary_interleaved no_rope_freq mrope_section window_size window_attn_skip_freq
    experimental_attention_variant dsa_indexer_n_heads dsa_indexer_head_dim dsa_indexer_topk
    dsa_indexer_topk_freq dsa_indexer_skip_topk_offset dsa_indexer_rope_interleaved
    dsa_indexer_rotate_activation dsa_indexer_scoring_relu dsa_indexer_k_norm_epsilon
    linear_attention_freq linear_conv_kernel_dim linear_key_head_dim linear_value_head_dim
    linear_num_key_heads linear_num_value_heads
    num_moe_experts moe_layer_freq moe_ffn_hidden_size moe_latent_size
    moe_shared_expert_intermediate_size moe_shared_expert_gate
    moe_router_topk moe_router_num_groups moe_router_group_topk moe_router_pre_softmax
    moe_router_topk_scaling_factor moe_router_score_function moe_router_enable_expert_bias
    moe_router_dtype moe_apply_probs_on_input
    is_hybrid_model mamba_state_dim mamba_head_dim mamba_num_groups mamba_num_heads
    heterogeneous_block_specs multi_latent_attention
    """.split()
)
# Fields that MLATransformerConfig adds; without multi-latent attention they mean nothing.
MLA_FIELDS = frozenset(
    """
    q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim rope_type
    rotary_scaling_factor original_max_position_embeddings beta_fast beta_slow mscale
    mscale_all_dim
    """.split()
)
# Fields that may be a number or a list with an entry for each layer.
_FREQUENCIES = {"no_rope_freq", "linear_attention_freq"}
REQUIRED = ("num_layers", "hidden_size", "num_attention_heads")
POSITION_EMBEDDINGS = ("rope", "mrope", "yarn", "relative", "learned_absolute", "none")
MODEL_TYPES = ("GPTModel", "HybridModel", "MambaModel")


class _Form(TypedDict, total=False):
    transformer: dict[str, Any]


class Difference(NamedTuple):
    """A value in which two descriptions of a model differ."""

    name: str
    mine: Any
    theirs: Any


@dataclass(frozen=True)
class Architecture:
    """A model's resolved architecture.

    ``transformer`` holds fields of megatron-core's configuration with JSON values
    (``activation_func`` by name); the fields left out have megatron-core's defaults.
    ``vocab_size`` counts the rows of the embedding, padding included.
    ``rope_scaling`` is Llama 3's, with ``rope_scaling_factor``. ``rope_parameters`` has the scaling
    that megatron-core does not compute (``models/rotary.py``), by transformers' names. ``yarn`` has
    the values of the position embedding ``yarn`` by megatron-core's names, for attention without
    latents. ``multipliers`` are constant factors (``models/multipliers.py``): ``embedding`` of the
    embeddings, ``residual`` of what attention and MLP add, ``logits_divisor`` below the logits;
    ``rounded``: that of embeddings is rounded to their dtype.
    ``post_norms``: what attention and MLP give is normalized too (``models/post_norms.py``);
    ``pre_norms`` False: what they get is not. ``full_width_qk_norms``: the norms of queries and
    keys are over all heads at once (``models/full_width_norms.py``). ``local_rotary_base`` is that
    of layers within a window, where it is another one (``models/local_rotary.py``).
    ``attention_chunks`` (``size``, and 1 in ``layers`` for each layer that attends within chunks)
    and ``attention_temperature`` (``floor_scale`` and ``scale``, on layers without rotation) are
    Llama 4's (``models/llama4_attention.py``); Ministral 3 has the latter on all layers, ``from``
    position 0.
    """

    transformer: dict[str, Any]
    vocab_size: int
    max_position_embeddings: int
    position_embedding_type: str = "rope"
    rotary_base: float = 10000.0
    rotary_percent: float = 1.0
    rope_scaling: bool = False
    rope_scaling_factor: float = 8.0
    rope_parameters: dict[str, Any] | None = None
    yarn: dict[str, Any] | None = None
    multipliers: dict[str, float | bool] | None = None
    post_norms: bool = False
    pre_norms: bool = True
    full_width_qk_norms: bool = False
    local_rotary_base: float | None = None
    attention_chunks: dict[str, Any] | None = None
    attention_temperature: dict[str, float] | None = None
    share_embeddings_and_output_weights: bool = False
    model_type: str = "GPTModel"
    hybrid_layer_pattern: str | None = None
    huggingface_architecture: str | None = None

    def __post_init__(self) -> None:
        unknown = sorted(set(self.transformer) - TRANSFORMER_FIELDS - MLA_FIELDS)
        if unknown:
            raise ValueError(f"not fields of an architecture: {', '.join(unknown)}")

    @property
    def multi_latent_attention(self) -> bool:
        """Whether megatron-core's MLATransformerConfig describes the model."""
        return bool(self.transformer.get("multi_latent_attention"))

    @property
    def is_hybrid(self) -> bool:
        """Whether each layer has one part, as ``hybrid_layer_pattern`` says: HybridModel's."""
        return self.model_type != "GPTModel"

    @property
    def has_delta_nets(self) -> bool:
        """Whether some layers have a gated delta net in place of attention."""
        return self.transformer.get("experimental_attention_variant") == "gated_delta_net"

    @property
    def recurrent_layers(self) -> str:
        """What its layers that keep a state of the tokens so far are called; empty: it has none."""
        if self.is_hybrid:
            return "Mamba layers"
        return "gated delta nets" if self.has_delta_nets else ""

    @property
    def unfusable_norms(self) -> str:
        """What ModelOpt's importer does not read where norms are fused with the linears after them.

        Such are Transformer Engine's layers. Empty: it reads all of the model.
        """
        if self.multi_latent_attention:
            return "the norms of its latents"
        if self.has_delta_nets:
            return "gated delta nets"
        if not self.pre_norms:
            return "layers without norms before them"
        return "the biases of its LayerNorms" if self.value("normalization") == "LayerNorm" else ""

    def value(self, name: str) -> Any:
        """The value of a transformer field, or megatron-core's default."""
        return self.resolved()[name]

    def resolved(self) -> dict[str, Any]:
        """All values in one flat dictionary by name, with megatron-core's defaults filled in."""
        table = transformer_fields.load()
        names = TRANSFORMER_FIELDS | (MLA_FIELDS if self.multi_latent_attention else set())
        default = "mla_default" if self.multi_latent_attention else "default"
        values = {n: table[n].get(default, table[n]["default"]) for n in sorted(names)}
        values |= self.transformer
        hidden, heads = values["hidden_size"], values["num_attention_heads"]
        derived = {
            "num_query_groups": heads,
            "kv_channels": hidden // heads if heads else None,
            "ffn_hidden_size": 4 * hidden,
        }
        if self.is_hybrid:
            derived["mamba_num_heads"] = 2 * hidden // values["mamba_head_dim"]
        values |= {name: value for name, value in derived.items() if values[name] is None}
        values |= {name: self._of_each(name, values[name]) for name in _FREQUENCIES}
        if values["num_moe_experts"] and values["moe_ffn_hidden_size"] is None:
            values["moe_ffn_hidden_size"] = values["ffn_hidden_size"]
        return values | {n: getattr(self, n) for n in OWN_FIELDS}

    def differences(self, other: Architecture) -> list[Difference]:
        """The values in which the two models differ, by name.

        Values that influence neither are not compared, nor is the name of the Hugging Face
        architecture if one side does not know it.
        """
        mine, theirs = self.resolved(), other.resolved()
        skipped = self.irrelevant() & other.irrelevant()
        if None in (self.huggingface_architecture, other.huggingface_architecture):
            skipped |= {"huggingface_architecture"}
        return _differing(mine, theirs, (mine.keys() | theirs.keys()) - skipped)

    def contradictions(self, stated: Mapping[str, Any]) -> list[Difference]:
        """The values of ``stated`` (flat, by name) that this architecture does not have.

        The router's precision is not compared: confs of Megatron-LM ask for float32, and a model
        whose files are known has the one that transformers computes in. Nor are the positions of a
        model with Mamba layers: Megatron-LM's conf of Nemotron-H 4B asks for rotated ones, which
        its files do not know.
        """
        names = stated.keys() - self.irrelevant() - {"moe_router_dtype"}
        if self.is_hybrid:
            names -= {"position_embedding_type", "rotary_base", "rotary_percent"}
        found = {name: self._of_each(name, stated[name]) for name in _FREQUENCIES & stated.keys()}
        stated = {**stated, **found}
        return _differing(stated, self.resolved(), names)

    def _of_each(self, name: str, frequency: Any) -> Any:
        """A frequency as a list with an entry for each layer.

        Of a number n, each n-th layer is not rotated, or has attention and no gated delta net.
        """
        layers = self.transformer.get("num_layers") or 0
        if not isinstance(frequency, int) or frequency < 1:
            return frequency
        if name == "no_rope_freq":
            whole = layers % frequency == 0  # megatron-core takes no other
            return ([0] * (frequency - 1) + [1]) * (layers // frequency) if whole else frequency
        return [int((layer + 1) % frequency != 0) for layer in range(layers)]

    def irrelevant(self) -> set[str]:
        """Names whose values do not influence this model."""
        names = {"model_type"} if self.model_type == "GPTModel" else set()
        # Heads with latents have sizes of their own, and each its own keys and values.
        latent = self.multi_latent_attention
        names |= {"kv_channels", "num_query_groups"} if latent else set(MLA_FIELDS)
        if self.position_embedding_type != "learned_absolute":
            names.add("max_position_embeddings")
        if self.position_embedding_type not in ("rope", "mrope", "yarn"):
            names |= {"rotary_base", "rotary_percent", "rotary_interleaved", "rope_scaling"}
        if not self.rope_scaling:
            names.add("rope_scaling_factor")
        return names

    def to_json(self) -> dict[str, Any]:
        """As a JSON object; :meth:`from_json` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Architecture:
        """The architecture that a manifest holds; UsageError for values that are none."""
        what = "the architecture in the manifest run.json"
        remedy = "make the checkpoint again with this version"
        forms.parse(content, dict[str, Any], what, remedy)
        forms.parse(content, _Form, what, remedy)
        fields = dataclasses.fields(cls)
        required = {each.name for each in fields if each.default is dataclasses.MISSING}
        missing = sorted(required - content.keys())
        unknown = sorted(
            (content.keys() - {each.name for each in fields})
            | (content.get("transformer", {}).keys() - TRANSFORMER_FIELDS - MLA_FIELDS)
        )
        if missing or unknown:
            raise UsageError(
                what,
                f"missing: {', '.join(missing) or '-'}; unknown: {', '.join(unknown) or '-'}",
                remedy,
            )
        found = cls(**content)  # as it is: a form makes floats of integers
        found.check(what, remedy)
        return found

    def check(self, what: str, remedy: str = "compare it with the original") -> None:
        """UsageError unless values have their types, and sizes that a model may have."""
        own = {name: getattr(self, name) for name in OWN_FIELDS}
        forms.parse({**own, "transformer": self.transformer}, type(self), what, remedy)
        architecture_form.check_transformer(self.transformer, what, remedy)
        architecture_form.check_sizes({**self.transformer, **own}, what, remedy)


OWN_FIELDS = tuple(f.name for f in dataclasses.fields(Architecture) if f.name != "transformer")


def _differing(
    mine: Mapping[str, Any], theirs: Mapping[str, Any], names: Iterable[str]
) -> list[Difference]:
    values = (Difference(name, mine.get(name), theirs.get(name)) for name in sorted(names))
    return [each for each in values if not same(each.mine, each.theirs)]


def same(a: Any, b: Any) -> bool:
    """Equality of JSON values; floats to 1e-9 relative, so that 1e-6 read twice is the same."""
    if isinstance(a, int | float) and isinstance(b, int | float):
        return math.isclose(a, b, rel_tol=1e-9)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return list(a) == list(b)
    return bool(a == b)


def show(differences: Iterable[Difference], mine: str, theirs: str) -> str:
    """One line: ``num_layers is 28 in the conf and 24 in config.json; ...``."""
    return "; ".join(
        f"{d.name} is {d.mine!r} in {mine} and {d.theirs!r} in {theirs}" for d in differences
    )
