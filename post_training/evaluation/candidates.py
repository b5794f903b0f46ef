"""The models of an evaluation while it runs: the one that is judged, and its reference."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from post_training.checkpoints import loading, part_weights
from post_training.checkpoints.source import Source
from post_training.common.errors import UsageError
from post_training.config.options import StageOptions
from post_training.evaluation.answers import Measure
from post_training.inference.by_layers import LayeredModel
from post_training.models import builder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from post_training.checkpoints.dequantize import Exported
    from post_training.distributed.session import Session

logger = logging.getLogger("post_training")


@dataclass
class Candidate:
    """A model that is loaded when it is first used, and can be dropped again.

    Every method is a collective call.

    Attributes:
        role: ``model`` or ``reference``.
        source: as :func:`fetch_source` gives it.
        options: those that name it.
        open_export: opens the folder of a model that an export quantized.
        notes: what the report says of this model beside its measures.
        weights_only: of a quantized model nothing but the weights is rounded.
    """

    role: str
    source: Source
    options: StageOptions
    session: Session
    open_export: Callable[[Path], Exported]
    weights_only: bool = False
    notes: dict[str, Any] = field(default_factory=dict)
    _model: torch.nn.Module | None = None

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return loading.tokenizer(self.source, self.options)

    @cached_property
    def eos_ids(self) -> list[int]:
        return loading.end_tokens(self.source, self.options, self.tokenizer)

    @property
    def positions(self) -> int:
        """Most tokens of a text."""
        return self.source.architecture.max_position_embeddings

    @property
    def model(self) -> torch.nn.Module:
        if self._model is None:
            self._model = loading.load(
                self.source, self.options, self.session, open_export=self._opened
            )
            if self.weights_only:
                _round_weights_only(self._model)
        return self._model

    @cached_property
    def layered(self) -> LayeredModel:
        """The model, one layer in memory at a time."""
        build = loading.build_options(self.source, self.options)
        model = builder.build(self.source.architecture, build, weights=False)
        weights = part_weights.opened(model, self.source, self.options, self._opened)
        reading = partial(loading.verified, Path(self.source.location), self.options)
        return LayeredModel(model, weights, reading, self.session.show_progress)

    def _opened(self, folder: Path) -> Exported:
        """An exported folder; the log and the report say if an engine would round more."""
        found = self.open_export(folder)
        if found.rounds_more and "weights_only" not in self.notes:
            self.notes["weights_only"] = True
            logger.warning(
                "%s: its weights alone are judged; an engine rounds inputs, keys or values too, as "
                "the checkpoint that it was exported from does here",
                folder,
            )
        return found

    def drop(self) -> None:
        """Free the weights' memory."""
        self._model = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def inputs(self) -> list[dict[str, Any]]:
        """As a report records it."""
        return self.source.inputs(self.role)


Ask = Callable[[Candidate], Sequence[Measure]]


def ask_all(candidates: Sequence[Candidate], asks: Sequence[Ask]) -> list[list[Measure]]:
    """Each candidate's measures. Its model is dropped then: one is in memory, unless both were."""
    found: list[list[Measure]] = []
    for candidate in candidates:
        found.append([measure for ask in asks for measure in ask(candidate)])
        candidate.drop()
    return found


def require_same_tokens(candidates: Sequence[Candidate]) -> None:
    """Raise UsageError unless the same text is the same tokens for all."""
    first, *others = (each.tokenizer.get_vocab() for each in candidates)
    for vocabulary, candidate in zip(others, candidates[1:], strict=True):
        if vocabulary != first:
            raise UsageError(
                f"--reference {candidate.source.location}",
                "its tokenizer makes other tokens of the text than the model's",
                "compare models with the same tokenizer, or leave --text out",
            )


def _round_weights_only(model: torch.nn.Module) -> None:
    """Switch off the quantizers of inputs, keys and values."""
    from modelopt.torch.quantization.nn import TensorQuantizer

    for name, module in model.named_modules():
        if isinstance(module, TensorQuantizer) and not name.endswith("weight_quantizer"):
            module.disable()
