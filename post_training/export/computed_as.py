"""Whether an exported ``config.json`` describes the model that was computed with.

Sizes are seen in the tensors' shapes; these values are seen nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from post_training.common.errors import UsageError
from post_training.models.architecture import Architecture, same
from post_training.models.families import registry as families

_VALUES = (
    *("num_attention_heads", "num_query_groups", "activation_func", "layernorm_epsilon"),
    *("rotary_base", "rotary_percent", "rope_scaling", "rope_scaling_factor", "moe_router_topk"),
    *("local_rotary_base", "post_norms", "pre_norms", "full_width_qk_norms"),
)


def problems(written: Mapping[str, Any], model: Architecture) -> list[str]:
    """What the configuration says otherwise; nothing for an architecture of no known family.

    Args:
        written: content of the exported ``config.json``.
    """
    plain = {key: value for key, value in written.items() if key != "quantization_config"}
    if families.of(plain).architecture not in (plain.get("architectures") or ()):
        return []
    try:
        said = families.from_huggingface(plain).resolved()
    except UsageError as error:
        return [f"{error.what}: {error.cause}"]
    mine = model.resolved()
    return [
        f"config.json says {name} = {said.get(name)}, the model has {mine.get(name)}"
        for name in _VALUES
        if not same(said.get(name), mine.get(name))
    ]
