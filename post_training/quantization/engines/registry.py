"""The engines that exports are made for. No torch.

To add one: a file with its table, and a row here (docs/extending.md).
"""

from __future__ import annotations

from post_training.quantization.engines.base import COMPRESSED_TENSORS, GENERATIONS, Engine
from post_training.quantization.engines.sglang import SGLANG
from post_training.quantization.engines.tensorrt_llm import TENSORRT_LLM
from post_training.quantization.engines.vllm import VLLM

# The first is the default of --target.
ENGINES: tuple[Engine, ...] = (
    VLLM,
    TENSORRT_LLM,
    SGLANG,
)
TARGETS: dict[str, Engine] = {engine.target: engine for engine in ENGINES}
DEFAULT = ENGINES[0].target


def algorithms() -> list[str]:
    """Every exported algorithm that an engine reads."""
    return list(dict.fromkeys(name for engine in ENGINES for name in engine.algorithms))


def stored_as(algorithm: str, target: str) -> str:
    """The engine's own layout of the numbers that ``algorithm`` names a layout of."""
    for engine in ENGINES:
        others = {own: other for other, own in engine.stored_as.items()}
        algorithm = others.get(algorithm, algorithm)
    return TARGETS[target].stored_as.get(algorithm, algorithm)


def refusal(algorithm: str, target: str, kv_cache: str = "") -> str:
    """Why the engine of ``target`` does not read an export; empty if it does.

    Args:
        algorithm: ``quant_algo``; empty for an export that is not quantized.
        kv_cache: ``kv_cache_quant_algo``; empty for none.
    """
    engine = TARGETS[target]
    others = [e.name for e in ENGINES if algorithm in e.algorithms]
    if algorithm and algorithm not in engine.algorithms:
        readers = f"; {', '.join(others)} would" if others else ""
        return (
            f"{engine.name} ({engine.version}) is not known to read {algorithm} as it is exported "
            f"here{readers}"
        )
    if kv_cache and kv_cache not in engine.kv_caches:
        return f"{engine.name} ({engine.version}) is not known to read {kv_cache} keys and values"
    beside = engine.algorithms[algorithm].kv_cache if algorithm else True
    if algorithm in COMPRESSED_TENSORS:
        beside = kv_cache in engine.compressed_kv_caches
    if kv_cache and not beside:
        return (
            f"{engine.name} ({engine.version}) is not known to read {kv_cache} keys and values "
            f"beside {algorithm}"
        )
    return ""


def experts_refusal(algorithm: str, target: str) -> str:
    """Why an engine does not read experts so; empty if it does."""
    engine = TARGETS[target]
    if algorithm not in engine.algorithms or engine.algorithms[algorithm].experts:
        return ""
    loader = engine.loader_of(algorithm).rpartition("/")[2]
    return f"{engine.name} does not read experts in {algorithm} as exported here ({loader})"


def describe(algorithm: str) -> tuple[str, str]:
    """The engines that read an algorithm, and the GPUs that run it; empty if none does."""
    readers = [engine for engine in ENGINES if algorithm in engine.algorithms]
    native = {gpu for engine in readers for gpu in engine.algorithms[algorithm].native}
    gpus = [_in_order(native)] if native else ["those of the formats inside"] if readers else []
    alone: dict[str, list[str]] = {}
    for engine in readers:
        unpacked = _in_order(set(engine.algorithms[algorithm].weights_alone) - native)
        if unpacked:
            alone.setdefault(unpacked, []).append(engine.name)
    gpus += [f"weights alone on {where} ({', '.join(names)})" for where, names in alone.items()]
    return ", ".join(engine.name for engine in readers), "; ".join(gpus)


def _in_order(generations: set[str]) -> str:
    return ", ".join(each for each in GENERATIONS if each in generations)
