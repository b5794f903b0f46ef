"""Calibration: data through the model, and a record of what the quantizers really saw."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from post_training.inference import forward, generation
from post_training.quantization import probe

if TYPE_CHECKING:
    from post_training.data.calibration_data import CalibrationData


@dataclass
class Calibration:
    """Runs sequences through a model; an instance is the forward loop that ModelOpt calls.

    Every data-parallel rank takes its share. All run the same number of batches (a rank with
    fewer repeats its first), because layers with experts exchange tokens between ranks.

    Attributes:
        data: packed sequences.
        batch_size: sequences a forward pass.
        show_progress: draw a progress bar.
        tokens: tokens computed so far by all ranks; some algorithms make several passes.
        seconds: time that took.
    """

    data: CalibrationData
    batch_size: int
    show_progress: bool = False
    tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def to_json(self) -> dict[str, Any]:
        """The data really used, for a manifest."""
        samples = self.data
        return {
            "source": samples.source,
            "sequences": len(samples.input_ids),
            "requested": samples.requested,
            "sequence_length": samples.input_ids.shape[1],
            "documents": samples.documents,
            "tokens": samples.tokens,
            "tokens_computed": self.tokens,
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(self.tokens_per_second, 1),
            "notes": list(samples.notes),
        }

    def batches(self) -> list[torch.Tensor]:
        """This rank's batches, int64 [at most batch_size, s] each, as many as on any rank."""
        rank, size, _ = generation.data_parallel()
        mine = list(self.data.batches(self.batch_size, rank, size))
        first = list(self.data.batches(self.batch_size, 0, size))
        return [mine[i] if i < len(mine) else first[i] for i in range(len(first))]

    @torch.no_grad()
    def __call__(self, model: torch.nn.Module) -> None:
        """Run everything once; every rank of the model takes part."""
        self._run(model, self.batches())

    @torch.no_grad()
    def probe(
        self, model: torch.nn.Module, seen: Mapping[str, int] | None = None
    ) -> dict[str, int]:
        """Run one batch and count the rows that reach each quantizer (:func:`watching`).

        Calibration itself calls quantizers of weights, so only a forward pass apart from it shows
        whether the layers do.

        Args:
            seen: rows counted during calibration; what experts saw there counts too, since few
                tokens choose each.
        """
        with watching(model) as rows:
            self._run(model, self.batches()[:1])
        earlier = seen or {}
        return {
            name: count + (earlier.get(name, 0) if "experts" in name else 0)
            for name, count in rows.items()
        }

    def _run(self, model: torch.nn.Module, batches: list[torch.Tensor]) -> None:
        core = forward.unwrap(model)
        _, ranks, _ = generation.data_parallel()
        started = time.monotonic()
        with tqdm(
            total=sum(batch.numel() for batch in batches) * ranks,
            desc="calibrating",
            unit=" tokens",
            unit_scale=True,
            disable=not self.show_progress,
        ) as bar:
            for batch in batches:
                run_batch(core, batch)
                self.tokens += batch.numel() * ranks
                bar.update(batch.numel() * ranks)
        self.seconds += time.monotonic() - started


def run_batch(core: Any, input_ids: torch.Tensor) -> None:
    """One forward pass of [b, s] tokens over the pipeline; the result is dropped.

    The output layer computes one position of each sequence, unless it has quantizers that must see
    them all: logits of every position are the largest tensor of a model.
    """
    input_ids = input_ids.to(forward.device_of(core))
    output = getattr(core, "output_layer", None)
    positions = None
    if output is None or not any(True for _ in probe.enabled(output)):
        positions = torch.full((len(input_ids),), input_ids.shape[1] - 1, device=input_ids.device)
    forward.run(core, input_ids, positions)


@contextlib.contextmanager
def watching(model: torch.nn.Module) -> Iterator[dict[str, int]]:
    """Within this context count, by quantizer name, the rows of input that each one is given.

    A row is a token for an input quantizer and a channel for a weight's. Zero means that the
    layer's forward pass goes around its quantizer, or, for an expert, that no token chose it.
    """
    rows: dict[str, int] = {}

    def counter(name: str) -> Callable[..., None]:
        def count(_module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
            tensor = arguments[0]
            rows[name] += tensor.numel() // max(1, tensor.shape[-1])

        return count

    with contextlib.ExitStack() as stack:
        for name, quantizer in probe.enabled(model):
            rows[name] = 0
            handle = quantizer.register_forward_pre_hook(counter(name))
            stack.callback(handle.remove)
        yield rows
