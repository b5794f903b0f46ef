"""What a table of an inference engine consists of. No torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

# In order of age.
GENERATIONS = ("Ampere", "Ada", "Hopper", "Blackwell")
MIXED = "MIXED_PRECISION"
MIXED_COMPRESSED = "MIXED_COMPRESSED_TENSORS"  # of several in that layout
# Written in the layout of compressed-tensors, not in ModelOpt's.
COMPRESSED_TENSORS = frozenset(
    (
        *("INT8_W8A8", "INT8_PER_CHANNEL_PER_TOKEN", "INT8_W8A16"),
        *("INT4_W4A16", "INT4_W4A8", "MXFP4", "W4A16_MXFP4"),
        MIXED_COMPRESSED,
    )
)
READ = "read in the loader's source"


@dataclass(frozen=True)
class Support:
    """How an engine runs one exported algorithm.

    Attributes:
        native: GPU generations whose kernels compute in the format; empty for a mixture, which
            runs where the formats inside it do.
        weights_alone: generations on which weights are unpacked and inputs stay in 16 bits.
        loader: the file that reads it, where that is not the engine's.
        version: that was read or run, where that is not the engine's.
        verified: how it is known: :data:`READ`, or the run that benchmarks/README.md describes.
        expert_inputs: least inputs of a linear of experts.
        kv_cache: whether keys and values may be quantized beside it.
        special: whether linears that files join (one tensor for q, k and v) may have it, and
            those of multi-latent attention.
        experts: whether linears of experts may have it too.
        multiples: what kernels need of a linear: outputs and inputs divisible by these.
        expert_multiples: the same of experts, where their kernel needs another.
        separate: whether q, k, v and gate, up must each be such multiples, not what is fused.
    """

    native: tuple[str, ...] = ()
    weights_alone: tuple[str, ...] = ()
    loader: str = ""
    version: str = ""
    verified: str = READ
    expert_inputs: int = 1
    kv_cache: bool = True
    special: bool = True
    experts: bool = True
    multiples: tuple[int, int] = (1, 1)
    expert_multiples: tuple[int, int] | None = None
    separate: bool = False

    def on(self, generation: str) -> str:
        """``yes``, ``weights alone`` or ``no``; ``as inside`` for a mixture."""
        if generation in self.native:
            return "yes"
        if generation in self.weights_alone:
            return "weights alone"
        return "no" if self.native or self.weights_alone else "as inside"


@dataclass(frozen=True)
class Engine:
    """One engine.

    Attributes:
        target: what ``--target`` calls it.
        name: as its project spells it.
        version: whose loader was read.
        loader: the file of that version that decides what is read.
        algorithms: ``quant_algo`` of ``hf_quant_config.json`` -> how it runs.
        stored_as: what it reads instead of another layout of the same numbers: the other's name
            -> its own.
        mixtures: what is exported with several algorithms in one model -> those that it reads so.
        kv_caches: ``kv_cache_quant_algo`` that it reads.
        compressed_kv_caches: those that it reads in the layout of compressed-tensors.
        last_layer: whether a draft may read the output of the model's last layer.
        not_modelopt: architectures that it does not load in ModelOpt's layout -> why.
    """

    target: str
    name: str
    version: str
    loader: str
    algorithms: Mapping[str, Support]
    stored_as: Mapping[str, str] = field(default_factory=dict)
    mixtures: Mapping[str, frozenset[str]] = field(default_factory=dict)
    kv_caches: frozenset[str] = frozenset()
    compressed_kv_caches: frozenset[str] = frozenset()
    last_layer: bool = True
    not_modelopt: Mapping[str, str] = field(default_factory=dict)

    def mixture(self, algorithms: Collection[str]) -> str:
        """What several algorithms in one model are exported as; empty if it does not read them."""
        found = (name for name, inside in self.mixtures.items() if inside.issuperset(algorithms))
        return next(found, "")

    def version_of(self, algorithm: str) -> str:
        """The version whose loader reads the algorithm."""
        return self.algorithms[algorithm].version or self.version

    def loader_of(self, algorithm: str) -> str:
        """The file that reads the algorithm."""
        return self.algorithms[algorithm].loader or self.loader
