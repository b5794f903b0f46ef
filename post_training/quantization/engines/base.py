"""What a table of an inference engine consists of. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# In order of age.
GENERATIONS = ("Ampere", "Ada", "Hopper", "Blackwell")
MIXED = "MIXED_PRECISION"
# Written in the layout of compressed-tensors, not in ModelOpt's.
COMPRESSED_TENSORS = frozenset(("INT8_W8A8", "INT8_W8A16", "INT4_W4A16"))


@dataclass(frozen=True)
class Support:
    """How an engine runs one exported algorithm.

    Attributes:
        native: GPU generations whose kernels compute in the format; empty for a mixture, which
            runs where the formats inside it do.
        loader: the file that reads it, where that is not the engine's.
        experts: whether linears of experts may have it too.
        multiples: what kernels need of a linear: outputs and inputs divisible by these.
        weights_alone: generations on which weights are unpacked and inputs stay in 16 bits.
    """

    native: tuple[str, ...] = ()
    weights_alone: tuple[str, ...] = ()
    loader: str = ""
    experts: bool = True
    multiples: tuple[int, int] = (1, 1)


@dataclass(frozen=True)
class Engine:
    """One engine.

    Attributes:
        name: as its project spells it.
        version: whose loader was read.
        loader: the file of that version that decides what is read.
        algorithms: ``quant_algo`` of ``hf_quant_config.json`` -> how it runs.
        mixes: algorithms that it reads side by side in one model.
    """

    name: str
    version: str
    loader: str
    algorithms: Mapping[str, Support]
    mixes: frozenset[str] = frozenset()
