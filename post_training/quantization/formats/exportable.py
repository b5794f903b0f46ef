"""What quantized layers can be exported as, from their number formats alone. No torch.

The same rules serve a name of the command line, a recipe and a quantized model.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from post_training.common.errors import UsageError
from post_training.quantization.engines import registry as engines
from post_training.quantization.formats.base import NO_KV_CACHE, Format, Linear
from post_training.quantization.formats.registry import KV_CACHES, WEIGHTS


@dataclass(frozen=True)
class Verdict:
    """What engines load the export as.

    Attributes:
        quant_algo: the name in ``hf_quant_config.json``; empty if there is none.
        reason: why engines would not read it correctly; empty if they do.
        kv_cache_quant_algo: the name for keys and values; empty if they are not quantized.
    """

    quant_algo: str = ""
    reason: str = ""
    kv_cache_quant_algo: str = ""

    @property
    def exportable(self) -> bool:
        return not self.reason


def judge(
    linears: Iterable[Linear],
    kv: str = NO_KV_CACHE,
    *,
    attention: bool = False,
    target: str = engines.DEFAULT,
) -> Verdict:
    """What quantized layers can be exported as.

    Args:
        linears: how linear layers are quantized; those that are not are left out.
        kv: how keys and values are quantized.
        attention: whether queries or probabilities are quantized too.
        target: the engine, by its name in ``--target``.
    """
    if attention:
        return Verdict(reason="engines do not quantize queries and attention probabilities")
    cache = KV_CACHES.get(kv)
    if cache is None:
        return Verdict(reason=f"no engine reads {kv} keys and values")
    if cache.refused:
        return Verdict(reason=cache.refused)
    algorithms = set()
    for linear in sorted(set(linears), key=lambda each: (each.weight, each.input)):
        found = _judge_linear(linear, target)
        if not found.exportable:
            return found
        algorithms.add(found.quant_algo)
    if not algorithms and kv != NO_KV_CACHE:
        return Verdict(
            reason="engines read scales of keys and values only in a model whose weights are "
            "quantized"
        )
    engine = engines.TARGETS[target]
    name = next(iter(algorithms), "")
    if len(algorithms) > 1:
        name = engine.mixture(algorithms)
    if algorithms and not name:
        return Verdict(reason=f"{engine.name} does not mix {', '.join(sorted(algorithms))}")
    refused = engines.refusal(name, target, cache.exported_as)
    if refused:
        return Verdict(reason=refused)
    return Verdict(name, kv_cache_quant_algo=cache.exported_as)


def _judge_linear(linear: Linear, target: str) -> Verdict:
    if linear.extra:
        return Verdict(reason=linear.extra)
    weight = WEIGHTS.get(linear.weight)
    algorithm = weight.exported_as.get(linear.input) if weight else None
    if algorithm in engines.algorithms():
        algorithm = engines.stored_as(algorithm, target)
        refused = engines.refusal(algorithm, target)
        return Verdict(reason=refused) if refused else Verdict(algorithm)
    refused = weight.refused if weight else ""
    inputs = linear.input or "16-bit"
    return Verdict(reason=refused or f"no engine reads {linear.weight} with {inputs} inputs")


def verdict(
    row: Format,
    *,
    weight_only: bool = False,
    kv_cache: str = NO_KV_CACHE,
    target: str = engines.DEFAULT,
) -> Verdict:
    """What a format can be exported as, with the flags that change it.

    Args:
        weight_only: ``--weight-only``: inputs stay in 16 bits.
        kv_cache: value of ``--export-kv-cache-quant``.
        target: value of ``--target``.
    """
    kv = row.kv if kv_cache == NO_KV_CACHE else kv_cache
    return judge(linears_of(row, weight_only), kv, attention=row.attention, target=target)


def linears_of(row: Format, weight_only: bool) -> list[Linear]:
    """How a format quantizes linear layers, with ``--weight-only`` or without: one or none."""
    if row.linear is None:
        return []
    return [Linear(row.linear.weight, "", row.linear.extra) if weight_only else row.linear]


def unexportable(what: str, found: Verdict) -> UsageError:
    """The error for a format that no engine would read correctly."""
    return UsageError(
        what,
        f"its export would not be read correctly: {found.reason}",
        "choose a format that the engine reads (bash export.sh --list-formats shows them), name "
        "another engine with --target, or give --allow-unexportable to score it without one",
    )


def unsavable(what: str, tensor_size: int) -> UsageError:
    """The error for :attr:`NumberFormat.stored_block_scales` on several tensor-parallel ranks."""
    return UsageError(
        f"{what} with TP={tensor_size}",
        "ModelOpt cannot save stored block scales that are split over ranks",
        "set TP=1; PP may be larger",
    )


def unpackable(what: str, tensor_size: int) -> UsageError:
    """The error for weights that ``--compress`` would pack on several tensor-parallel ranks."""
    return UsageError(
        f"{what} --compress with TP={tensor_size}",
        "ModelOpt packs each rank's part of a row with a scale of its own, which no other TP loads",
        "set TP=1, or leave --compress out; PP may be larger",
    )


def packed_twice(what: str) -> UsageError:
    """The error for weights with scales of blocks and one of the whole matrix (``--compress``)."""
    return UsageError(
        f"{what} --compress",
        "ModelOpt packs weights that are rounded twice so that no checkpoint of them loads",
        "leave --compress out: the export packs them",
    )
