"""Calibration of one decoder layer after the other, of a model that is never whole in memory.

A method that runs the data through the model several times gives each layer other inputs each time:
SmoothQuant's second pass, say, is of layers whose norms are changed. Each pass has hidden states of
its own here, so that every layer gets what it gets in the whole model, bit for bit.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.inference.utils import InferenceMode

from post_training.common.errors import UsageError
from post_training.distributed.collectives import from_all_ranks
from post_training.inference import forward, generation, layerwise
from post_training.inference.batching import Batching
from post_training.quantization import quantizers
from post_training.quantization.calibration import Calibration

logger = logging.getLogger("post_training")


@dataclass
class LayerCalibration(Calibration):
    """Runs hidden states through the layer that it is at, as ``Calibration`` does through a model.

    Attributes:
        states: by pass over the data, what the next layer gets of this rank's sequences, [n, s, h];
            on the device where a part of its free memory holds them, else in host memory.
        arguments: what each layer is called with beside.
        layer: the one that it is at, from 0.
        single: calibration looks at no data, so one batch is enough to see what is used.
    """

    states: list[torch.Tensor] = field(default_factory=list)
    arguments: list[layerwise.Arguments] = field(default_factory=list)
    layer: int = 0
    single: bool = False
    _module: Any = None
    _begun: torch.Tensor | None = None  # what the layer got in the first pass, or a part of it
    _passes_done: int = 0
    _into: torch.Tensor | None = None  # where the outputs of the running pass go

    def learn_arguments(self, model: Any) -> None:
        """Look at how the layers of the whole model are called; its embedding has weights."""
        with torch.no_grad():
            self.arguments = layerwise.other_arguments(model, self.batches()[0])

    @torch.no_grad()
    def embed(self, model: Any) -> None:
        """Find what the first layer gets; the model's embedding has weights."""
        batches = self.batches()[:1] if self.single else self.batches()
        found = layerwise.first_inputs(model, batches)
        self.states = [torch.cat([each.transpose(0, 1) for each in found])]
        found.clear()
        self.place()

    def place(self) -> None:
        """Put hidden states where there is room for them."""
        device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
        size = sum(each.nbytes for each in self.states)
        here = device if layerwise.fits(2 * size, device) else torch.device("cpu")
        self.states = [each.to(here) for each in self.states]

    def at(self, number: int, module: Any) -> None:
        """Go to a layer."""
        self.layer, self._module, self._passes_done = number, module, 0
        first = self.states[0]
        # The first layer begins every pass with the same; the others need a batch for the probe.
        self._begun = first.clone() if number == 0 else first[: len(self.batches()[0])].clone()

    def done(self) -> None:
        """The layer is calibrated: its outputs are the next one's inputs.

        Raises:
            UsageError: on every rank, if they are not finite.
        """
        self._pass_through()
        self._module = self._begun = None
        if self.layer == 0:
            self.place()  # there may be several passes now
        finite = all(bool(each.sum(dtype=torch.float32).isfinite()) for each in self.states)
        if not all(from_all_ranks(finite)):
            raise UsageError(
                f"the outputs of layer {self.layer}",
                "they are not finite, though its weights are: values overflow in this precision",
                "give --bf16 or --fp32; if it is in one of them already, compare the conf with the "
                "model's config.json",
            )

    def _pass_through(self) -> None:
        """Make the passes that calibration left out, of a layer without what needs data."""
        with contextlib.ExitStack() as stack:
            for _, quantizer in quantizers.enabled(self._module):
                quantizer.disable()
                stack.callback(quantizer.enable)
            while self._passes_done < len(self.states) and not self.single:
                self._into = self._next_pass()
                self._run(self._module, self._rows(), self.batching)
            self._into = None

    def __call__(self, model: torch.nn.Module) -> None:
        self._into = self._next_pass()
        try:
            super().__call__(model)
        finally:
            self._into = None

    def _next_pass(self) -> torch.Tensor:
        """The hidden states of the pass that begins."""
        number, self._passes_done = self._passes_done, self._passes_done + 1
        if number == len(self.states):
            if self.layer or self._begun is None:
                raise RuntimeError(f"layer {self.layer} asks for pass {number}, the first did not")
            self.states.append(self._begun.clone())
        return self.states[number]

    def forget_expert_tokens(self) -> None:
        """Those of this layer."""
        self.expert_tokens.pop(self.layer, None)
        self.expert_tokens_added.pop(self.layer, None)

    @torch.no_grad()
    def _run(self, model: torch.nn.Module, rows: torch.Tensor, batching: Batching) -> None:
        """Forward passes of the layer; outputs take the place of what it got.

        Args:
            rows: of the data, from its start.
        """
        into = self._into
        if into is None and self.single:  # no pass but this
            into = self.states[0]
        given = self._begun if into is None else into
        if given is None:
            raise RuntimeError("at no layer")
        core, (_, ranks, _) = forward.unwrap(model), generation.data_parallel()
        device, length = forward.device_of(core), rows.shape[1]
        others = self.arguments[self.layer]

        def compute(some: Sequence[int]) -> None:
            part = slice(some[0], some[-1] + 1)
            hidden = given[part].to(device).transpose(0, 1).contiguous()
            with InferenceMode.active():
                output = layerwise.run(self._module, hidden, others)
            if into is not None:
                into[part] = output.transpose(0, 1)

        started = time.monotonic()
        for some, _ in batching.over(
            core, range(len(rows)), compute, positions=lambda _: length, undo=self._undo
        ):
            if self.layer == 0:  # of the whole model, each token once
                self.tokens += len(some) * length * ranks
        self.seconds += time.monotonic() - started

    def enter(
        self, core: Any, batches: Sequence[torch.Tensor]
    ) -> tuple[list[layerwise.Arguments], list[torch.Tensor]]:
        states = self._next_pass()
        parts = states.split([len(each) for each in batches])
        return [self.arguments[self.layer]], [each.transpose(0, 1).contiguous() for each in parts]

    def leave(self, states: Sequence[torch.Tensor], tokens: int) -> None:
        if self.layer == 0:
            super().leave(states, tokens)
        parts = self.states[self._passes_done - 1].split([each.shape[1] for each in states])
        for part, output in zip(parts, states, strict=True):
            part.copy_(output.transpose(0, 1))

    def progress(self) -> dict[str, Any]:
        """What is counted so far, to go on from in another process."""
        return {
            "tokens": self.tokens,
            "seconds": self.seconds,
            "largest": self.batching.largest,
            "expert_tokens": list(self.expert_tokens.items()),
            "expert_tokens_added": list(self.expert_tokens_added.items()),
            "ratios": [[*key, ratio] for key, ratio in self.ratios.items()],
            "gptq": self.gptq,
        }

    def go_on(self, found: dict[str, Any]) -> None:
        """Take over what :meth:`progress` gave."""
        self.tokens, self.seconds = found["tokens"], found["seconds"]
        self.batching.largest = found["largest"]
        self.expert_tokens.update({int(layer): each for layer, each in found["expert_tokens"]})
        self.expert_tokens_added.update(
            {int(layer): each for layer, each in found["expert_tokens_added"]}
        )
        self.ratios.update({(rank, name): ratio for rank, name, ratio in found["ratios"]})
        self.gptq.update(found["gptq"])
