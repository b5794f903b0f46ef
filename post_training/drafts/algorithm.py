"""What a draft algorithm is to the rest: the interface of a folder beside this file. No torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from post_training.drafts.eagle3.draft import Draft
from post_training.models.architecture import Architecture

if TYPE_CHECKING:
    import numpy
    import torch

    from post_training.training.task import Task


class DraftAlgorithm(ABC):
    """One way to propose tokens. Methods import torch, the class does not.

    ``model`` is this rank's part of a megatron-core model, changed in place.

    Attributes:
        name: in ``--algorithm`` and in the record of a drafted checkpoint.
        module: the draft in a model; the names of its tensors begin with it.
    """

    name: ClassVar[str]
    module: ClassVar[str]

    @abstractmethod
    def configuration(
        self, architecture: Architecture, overrides: Mapping[str, Any], dtype: str, option: str
    ) -> dict[str, Any]:
        """The configuration of a draft for this target, ``overrides`` last; no torch.

        Raises:
            UsageError: for values that cannot work; ``option`` names the overrides.
        """

    @abstractmethod
    def attach(self, model: Any, draft: Draft, seed: int) -> None:
        """Attach a new draft to the model and initialise it."""

    @abstractmethod
    def freeze_target(self, model: Any) -> None:
        """Let the draft alone be trained."""

    @abstractmethod
    def set_vocabulary(self, model: Any, counts: numpy.ndarray[Any, Any]) -> float:
        """Let the draft propose the most frequent tokens; returns the part of counts they cover.

        ``counts`` are int64 [vocabulary]; the draft's vocabulary is smaller than the target's.
        """

    @abstractmethod
    def task(self, model: Any, draft: Draft) -> Task:
        """The loss that the draft is trained with."""

    @abstractmethod
    def features(
        self, model: Any, input_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What the draft reads of its target: hidden states [s, b, h], auxiliary ones [s, b, n h].

        On the last pipeline stage; None on the others.
        """

    @abstractmethod
    def acceptance(
        self, model: Any, prompts: Sequence[list[int]], tokens: int, tokenizer: Any
    ) -> Callable[[int], dict[str, float]] | None:
        """What an evaluation measures by decoding; None where the model cannot verify.

        Decodes ``tokens`` for each of the prompts; the tokenizer is the target's.
        """
