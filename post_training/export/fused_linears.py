"""Linears that engines fuse: q, k and v; gate and up. They load parts that differ, and then compute
something else without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

from post_training.export.decoders.registry import SCALES

_FUSED = (
    *(("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3")),
    *(("in_proj_qkv", "in_proj_z"), ("in_proj_b", "in_proj_a")),
)


def problems(
    names: Collection[str],
    algorithm: Callable[[str], str | None],
    number: Callable[[str], float | None],
) -> Iterator[str]:
    """Fused linears whose parts have different algorithms, or scales of the whole linear.

    Args:
        names: of the architecture's tensors.
        algorithm: of a linear.
        number: what a tensor of one element holds; None for others, and where there is none.
    """
    for parts in _FUSED:
        first = f".{parts[0]}.weight"
        for name in sorted(name for name in names if name.endswith(first)):
            parent = name.removesuffix(first)
            modules = [f"{parent}.{part}" for part in parts]
            if any(f"{module}.weight" not in names for module in modules):
                continue  # an attention without values of its own
            together = f"{', '.join(modules)} are computed as one, but"
            found = sorted({str(algorithm(module)) for module in modules})
            if len(found) > 1:
                yield f"{together} are {' and '.join(found)}"
            for kind in sorted(SCALES):
                if len({number(f"{module}.{kind}") for module in modules}) > 1:
                    yield f"{together} differ in {kind}"
