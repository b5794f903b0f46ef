"""A model that is never whole in memory: all batches pass through a layer before the next one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.inference.utils import InferenceMode
from tqdm import tqdm

from post_training.checkpoints.part_weights import PartWeights
from post_training.inference import layerwise
from post_training.models import parts


@dataclass
class LayeredModel:
    """A model built without weights, and what reads them. Collective calls.

    Attributes:
        model: its decoder's layers are never there for a caller.
        weights: reads its parts.
        reading: a context in which they are read.
        show_progress: draw a progress bar.
    """

    model: Any
    weights: PartWeights
    reading: Callable[[], AbstractContextManager[Any]] = field(default=nullcontext)
    show_progress: bool = False

    def hidden_states(
        self, batches: Sequence[torch.Tensor], *, inference: bool = True
    ) -> list[torch.Tensor]:
        """What the last layer gives for each batch of ids [b, s]: [s, b, h], where there is room.

        Args:
            inference: compute the layers in megatron-core's mode for it.
        """
        every = parts.of(self.model)
        bar = tqdm(every, desc="layers", unit="part", disable=not self.show_progress)
        with self.reading():
            for number, part in enumerate(bar):
                self.weights.read(number, part)
                if number == 0:
                    by_length = {batch.shape[1]: batch for batch in batches}
                    others = {
                        length: layerwise.other_arguments(self.model, batch)
                        for length, batch in by_length.items()
                    }
                    states = layerwise.first_inputs(self.model, batches)
                elif part.layer is not None:
                    with InferenceMode.active() if inference else nullcontext():
                        states = [
                            layerwise.run(part.layer, hidden, others[len(hidden)][number - 1]).to(
                                hidden.device
                            )
                            for hidden in states
                        ]
                if part.layer is not None or number == 0:
                    parts.release(part.model)
        self.weights.finish(self.model)
        return states

    def end(self) -> Any:
        """What computes logits from hidden states; its weights were read by the way."""
        end = parts.end_of(self.model)
        if self.model.share_embeddings_and_output_weights:
            self.weights.read(0, parts.of(self.model)[0])
        return end.eval()
