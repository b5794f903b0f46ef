"""What quantized layers can be exported as, from their number formats alone. No torch.

The same rules serve a name of the command line, a recipe and a quantized model.
"""

from __future__ import annotations

from collections.abc import Iterable

from post_training.common.errors import UsageError
from post_training.quantization.engines import registry as engines
from post_training.quantization.engines.base import MIXED
from post_training.quantization.formats.base import (
    LOW_RANK,
    PRE_QUANT_SCALE,
    Format,
    Linear,
    Verdict,
)
from post_training.quantization.formats.kv_cache import NONE
from post_training.quantization.formats.registry import KV_CACHES, WEIGHTS

_REFUSED_EXTRA = {
    PRE_QUANT_SCALE: "inputs are multiplied by a factor per channel (pre_quant_scale), which "
    "ModelOpt's exporter for Megatron drops or refuses",
    LOW_RANK: "a low-rank product is added to each linear layer, which no engine computes",
}


def judge(linears: Iterable[Linear], kv: str = "", *, attention: bool = False) -> Verdict:
    """What quantized layers can be exported as.

    Args:
        linears: how linear layers are quantized; those that are not are left out.
        kv: how keys and values are quantized, or empty.
        attention: whether queries or probabilities are quantized too.
    """
    if attention:
        return Verdict(False, reason="engines do not quantize queries and attention probabilities")
    cache = KV_CACHES.get(kv)
    if kv and (cache is None or not cache.exported_as):
        reason = cache.refused if cache else f"no engine reads {kv} keys and values"
        return Verdict(False, reason=reason)
    algorithms = set()
    for linear in sorted(set(linears), key=lambda each: (each.weight, each.input)):
        algorithm = _algorithm(linear)
        if not algorithm:
            return Verdict(False, reason=_why_not(linear))
        algorithms.add(algorithm)
    if not algorithms:
        if kv:
            return Verdict(
                False,
                reason="engines read scales of keys and values only in a model whose weights are "
                "quantized",
            )
        return Verdict(True)
    if len(algorithms) > 1 and not engines.mixable(algorithms):
        mixture = ", ".join(sorted(algorithms))
        return Verdict(False, reason=f"{engines.ENGINES[0].name} does not mix {mixture}")
    name = algorithms.pop() if len(algorithms) == 1 else MIXED
    return Verdict(True, name, kv_cache_quant_algo=cache.exported_as if cache else "")


def _algorithm(linear: Linear) -> str:
    """``quant_algo`` of a linear layer; empty if no engine reads one."""
    weight = WEIGHTS.get(linear.weight)
    algorithm = weight.exported_as.get(linear.input, "") if weight and not linear.extra else ""
    return algorithm if algorithm in engines.algorithms() else ""


def _why_not(linear: Linear) -> str:
    if linear.extra:
        return _REFUSED_EXTRA[linear.extra]
    weight = WEIGHTS.get(linear.weight)
    if weight and weight.refused:
        return weight.refused
    return f"no engine reads {linear.weight} with {linear.input or '16-bit'} inputs"


def verdict(row: Format, *, weight_only: bool = False, kv_cache: str = NONE) -> Verdict:
    """What a format can be exported as, with the flags that change it.

    Args:
        weight_only: ``--weight-only``: inputs stay in 16 bits.
        kv_cache: value of ``--export-kv-cache-quant``.
    """
    linears = []
    if row.linear is not None:
        linear = row.linear
        linears = [Linear(linear.weight, "", linear.extra) if weight_only else linear]
    kv = row.kv if kv_cache == NONE else kv_cache
    return judge(linears, kv, attention=row.attention)


def unexportable(what: str, found: Verdict) -> UsageError:
    """The error for a format that no engine would read correctly."""
    return UsageError(
        what,
        f"its export would not be read correctly: {found.reason}",
        "choose an exportable format (docs/formats.md has the table), or give "
        "--allow-unexportable to score it without an engine",
    )
