"""Rotary positions of multi-latent attention: YaRN's frequencies and factors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from post_training.models.families.positions import rope_scaling
from post_training.models.families.refusal import refuse


def scaling(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary scaling that is stated, in either form of the file, without nulls."""
    return {key: value for key, value in rope_scaling(config).items() if value is not None}


def latent_positions(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of TransformerConfig for the positions; what the file leaves out, as transformers."""
    rope = scaling(config)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return {"rope_type": "rope"}
    if kind != "yarn":
        refuse(f"rope type {kind!r}", "only 'default' and 'yarn' can be represented so far")
    for key, only in (("truncate", True), ("attention_factor", None)):
        if rope.get(key, only) != only:
            refuse(f"rope scaling {key} = {rope[key]!r}", "megatron-core computes it")
    longest = config["max_position_embeddings"]
    original = rope.get("original_max_position_embeddings", longest)
    mscale, mscale_all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    if not mscale_all_dim and mscale in (None, 1.0):
        mscale, mscale_all_dim = 1.0, 0.0
    elif not (mscale and mscale_all_dim):
        refuse(
            f"rope scaling mscale = {mscale!r}, mscale_all_dim = {mscale_all_dim!r}",
            "transformers and the models' own code differ where one of them is missing",
            "state both",
        )
    return {
        "rope_type": "yarn",
        "rotary_scaling_factor": float(rope.get("factor", longest / original)),
        "original_max_position_embeddings": original,
        "beta_fast": float(rope.get("beta_fast") or 32),
        "beta_slow": float(rope.get("beta_slow") or 1),
        "mscale": float(mscale),
        "mscale_all_dim": float(mscale_all_dim),
    }
