"""The weights of a model that is never whole in memory, read part by part.

From a Hugging Face folder or from a Megatron checkpoint. A record of what was read lets another
process go on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from megatron.core.transformer import MegatronModule

from post_training.checkpoints import finite, loading, sharding, torch_dist
from post_training.checkpoints.dequantize import Exported
from post_training.checkpoints.huggingface_weights import HuggingFaceWeights
from post_training.checkpoints.source import Source
from post_training.config.options import StageOptions
from post_training.models import builder, parts
from post_training.models.parts import Part


class PartWeights(ABC):
    """Reads parts of a model without weights (``models.parts``). Collective calls."""

    @abstractmethod
    def read(self, number: int, part: Part) -> None:
        """Give the part its weights, on this rank's device.

        Raises:
            UsageError: if they do not fit, or are not finite.
        """

    @abstractmethod
    def known(self) -> list[str]:
        """For the record: what :meth:`go_on` takes."""

    @abstractmethod
    def go_on(self, known: Iterable[str]) -> None:
        """Parts were read before this process began."""

    @abstractmethod
    def finish(self, model: MegatronModule) -> None:
        """Raise UsageError if the source has what was not read."""


class OfFolder(PartWeights):
    """Those of a Hugging Face folder."""

    def __init__(
        self,
        model: MegatronModule,
        source: Source,
        options: StageOptions,
        exported: Exported | None = None,
    ) -> None:
        self._weights = HuggingFaceWeights(model, source, options, exported)
        self._folder = source.location

    def read(self, number: int, part: Part) -> None:
        parts.materialize(part.model)
        self._weights.read(part.model)
        finite.check_model(part.model, f"model {self._folder}", Path(self._folder))

    def known(self) -> list[str]:
        return sorted(self._weights.names_read)

    def go_on(self, known: Iterable[str]) -> None:
        self._weights.names_read.update(known)

    def finish(self, model: MegatronModule) -> None:
        self._weights.finish(model)


class OfCheckpoint(PartWeights):
    """Those of a Megatron checkpoint of a model that is not quantized.

    They are read into a second model without weights, as quantizers change how a model's tensors
    are named and cut in a checkpoint.
    """

    def __init__(self, source: Source, options: StageOptions) -> None:
        build = loading.build_options(source, options)
        self._plain = builder.build(source.architecture, build, weights=False)
        self._folder, self._parts = Path(source.location), parts.of(self._plain)
        self._not_read: set[str] | None = None

    def read(self, number: int, part: Part) -> None:
        plain = self._parts[number]
        parts.materialize(plain.model)
        left = self._load(plain.model)
        self._not_read = left if self._not_read is None else self._not_read & left
        finite.check_model(plain.model, f"checkpoint {self._folder}")
        parts.share(plain.model, part.model)
        parts.release(plain.model)

    def known(self) -> list[str]:
        return sorted(self._not_read or ())

    def go_on(self, known: Iterable[str]) -> None:
        self._not_read = set(known)

    def finish(self, model: MegatronModule) -> None:
        if self._not_read:
            raise torch_dist.differs(self._folder, [], sorted(self._not_read))

    def _load(self, part: MegatronModule) -> set[str]:
        """Load a part's tensors; names of the checkpoint's that are of other parts, or of none."""
        weights = torch_dist.iteration_folder(self._folder)
        tensors: dict[str, Any] = {}
        for name, module in part.named_children():
            if any(True for _ in module.parameters()):
                tensors |= sharding.sharded(part, weights, only=name)
        # Objects of Transformer Engine, one a layer, are to be asked for together.
        tensors = {n: each for n, each in tensors.items() if not n.endswith("_extra_state")}
        for name in ("output_layer.weight", "output_layer.bias"):
            if name in tensors:  # Megatron-LM pads the vocabulary
                tensors[name].allow_shape_mismatch = True
        state, lacking, more = torch_dist.read(tensors, self._folder, whole=False)
        if lacking := torch_dist.of_model(lacking, ""):
            raise torch_dist.differs(self._folder, lacking, [])
        self._plain.load_state_dict(state, strict=False)
        return set(torch_dist.of_model(more, ""))


def opened(
    model: MegatronModule,
    source: Source,
    options: StageOptions,
    open_export: Callable[[Path], Exported] | None = None,
) -> PartWeights:
    """What reads the parts of ``model`` from its source.

    Args:
        open_export: opens the folder of a source that is ``exported``.
    """
    if source.is_checkpoint:
        return OfCheckpoint(source, options)
    exported = open_export(Path(source.location)) if source.exported and open_export else None
    return OfFolder(model, source, options, exported)
