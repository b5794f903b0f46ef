"""Calibration: data through the model, and a record of what the quantizers really saw."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from post_training.common.errors import UsageError
from post_training.data.calibration_data import CalibrationData
from post_training.distributed.collectives import from_all_ranks
from post_training.inference import forward, generation, layerwise
from post_training.inference.batching import Batching
from post_training.quantization import expert_reach, experts, maxima, quantizers
from post_training.quantization.layer_names import first_names, global_name

logger = logging.getLogger("post_training")

_TOKENS_AT_ONCE = 4096


@dataclass
class Calibration:
    """Runs sequences through a model; an instance is the forward loop that ModelOpt calls.

    Every data-parallel rank takes its share. All run the same number of batches (a rank with
    fewer repeats its first), because layers with experts exchange tokens between ranks.

    Attributes:
        data: packed sequences.
        batching: sequences a forward pass. Where more than maxima are collected a pass cannot be
            repeated and its size may count: there it is :attr:`at_once`.
        show_progress: draw a progress bar.
        tokens: tokens computed so far by all ranks; some algorithms make several passes.
        seconds: time that took.
        expert_share: of a layer's experts, that each token reaches; 0: the router's choice.
        expert_tokens: tokens that the router sent to the experts of each layer, in one pass.
        expert_tokens_added: those that reached them beyond that.
        gptq: what GPTQ did; empty with other methods.
        ratios: GPTQ's errors over those of rounding to nearest (``gptq``).
        only_maxima: the calibration method collects nothing else.
    """

    data: CalibrationData
    batching: Batching
    show_progress: bool = False
    tokens: int = 0
    seconds: float = 0.0
    expert_share: float = 0.0
    expert_tokens: experts.ExpertTokens = field(default_factory=dict)
    expert_tokens_added: experts.ExpertTokens = field(default_factory=dict)
    gptq: dict[str, Any] = field(default_factory=dict)
    ratios: dict[tuple[int, str], float | None] = field(default_factory=dict)
    only_maxima: bool = False
    _counted: list[dict[int, torch.Tensor]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The data really used, for a manifest."""
        return {
            "source": self.data.source,
            "read": list(self.data.read),
            "sequences": len(self.data.input_ids),
            "requested": self.data.requested,
            "sequence_length": self.data.input_ids.shape[1],
            "documents": self.data.documents,
            "tokens": self.data.tokens,
            "tokens_computed": self.tokens,
            "sequences_at_a_time": self.batching.largest or self.at_once,
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(self.tokens / self.seconds, 1) if self.seconds else 0.0,
            "notes": list(self.data.notes),
            "expert_share": self.expert_share,
            "expert_tokens": {str(layer): n for layer, n in self.expert_tokens.items()},
            "expert_tokens_added": {str(layer): n for layer, n in self.expert_tokens_added.items()},
            **({"gptq": self.gptq} if self.gptq else {}),
        }

    @property
    def at_once(self) -> int:
        """Sequences a pass where passes are added up: a given number, or up to 4,096 tokens.

        The same on every machine, and with it the result.
        """
        most = max(1, _TOKENS_AT_ONCE // self.data.input_ids.shape[1])
        return self.batching.fixed if self.batching.is_given else most

    def batches(self, size: int | None = None) -> list[torch.Tensor]:
        """This rank's batches, int64 [at most ``size``, s] each; as many as on any rank."""
        return list(self._rows().split(size or self.at_once))

    def _rows(self) -> torch.Tensor:
        """This rank's sequences, int64 [n, s]; the same n on every rank."""
        rank, size, _ = generation.data_parallel()
        mine, first = (self.data.input_ids[each::size] for each in (rank, 0))
        return torch.cat([mine, first[len(mine) :]])

    def __call__(self, model: torch.nn.Module) -> None:
        """Run everything once; every rank of the model takes part."""
        self.forget_expert_tokens()
        with self.watching_experts(model):
            if self.only_maxima and maxima.are_all(model):
                with maxima.collecting(model):
                    self._run(model, self._rows(), self.batching)
            else:
                self._run(model, self._rows(), replace(self.batching, asked=self.at_once))
        experts.settle_idle(model)

    def enter(
        self, core: Any, batches: Sequence[torch.Tensor]
    ) -> tuple[list[layerwise.Arguments], list[torch.Tensor]]:
        """For what goes layer by layer: each one's other arguments, and the first one's inputs."""
        return layerwise.other_arguments(core, batches[0]), layerwise.first_inputs(core, batches)

    def leave(self, states: Sequence[torch.Tensor], tokens: int) -> None:
        """It is done: what the last layer gave for each batch, and this rank's tokens."""
        _, ranks, _ = generation.data_parallel()
        self.tokens += tokens * ranks

    def forget_expert_tokens(self) -> None:
        """Each pass has all data, so what is counted is that of the last one."""
        self.expert_tokens.clear()
        self.expert_tokens_added.clear()

    @contextlib.contextmanager
    def watching_experts(self, model: torch.nn.Module, *, count: bool = True) -> Iterator[None]:
        """In the block tokens reach the experts that they are to reach, and are counted.

        The end of the block is a collective call.
        """
        routed, added = (self.expert_tokens, self.expert_tokens_added) if count else ({}, {})
        with (
            experts.counting(model, routed) as chosen,
            expert_reach.reaching(model, self.expert_share, added) as further,
        ):
            self._counted = [chosen, further]
            yield
            self._counted = []

    def probe(
        self, model: torch.nn.Module, seen: Mapping[str, int] | None = None
    ) -> dict[str, int]:
        """Run one batch and count the rows that reach each quantizer (:func:`watching`).

        Calibration itself calls quantizers of weights, so only a forward pass apart from it shows
        whether the layers do. Nothing is rounded in it: that takes time, and on a GPU a compiler.

        Args:
            seen: rows counted during calibration; what experts saw there counts too, since few
                tokens choose each.
        """
        with watching(model) as rows, quantizers.not_rounding(model):
            self._run(model, self.batches(1)[0], replace(self.batching, asked=1))
        for name in rows:
            if seen and "experts" in name:
                rows[name] += seen.get(name, 0)
        return rows

    @torch.no_grad()
    def _run(self, model: torch.nn.Module, rows: torch.Tensor, batching: Batching) -> None:
        """Forward passes over the pipeline; the results are dropped.

        The output layer computes one position of each sequence, unless it has quantizers that must
        see them all: logits of every position are the largest tensor of a model.
        """
        core = forward.unwrap(model)
        output = getattr(core, "output_layer", None)
        whole = output is not None and any(True for _ in quantizers.enabled(output))
        _, ranks, _ = generation.data_parallel()
        device = forward.device_of(core)

        def compute(some: Sequence[int]) -> None:
            input_ids = rows[some[0] : some[-1] + 1].to(device)
            last = torch.full_like(input_ids[:, 0], input_ids.shape[1] - 1)
            forward.run(core, input_ids, None if whole else last)

        started = time.monotonic()
        with tqdm(
            total=rows.numel() * ranks,
            desc="calibrating",
            unit=" tokens",
            unit_scale=True,
            disable=not self.show_progress,
        ) as bar:
            length = rows.shape[1]
            for some, _ in batching.over(
                core, range(len(rows)), compute, positions=lambda _: length, undo=self._undo
            ):
                self.tokens += len(some) * length * ranks
                bar.update(len(some) * length * ranks)
        self.seconds += time.monotonic() - started

    def _undo(self) -> Callable[[], None]:
        """What takes back the tokens of experts that are counted from now on."""
        before = [dict(each) for each in self._counted]

        def take_back() -> None:
            for each, kept in zip(self._counted, before, strict=True):
                each.clear()
                each.update(kept)

        return take_back


@contextlib.contextmanager
def watching(model: torch.nn.Module) -> Iterator[dict[str, int]]:
    """Within this context count, by quantizer name, the rows of input that each one is given.

    A row is a token for an input quantizer and a channel for a weight's. Zero means that the
    layer's forward pass goes around its quantizer, or, for an expert, that no token chose it.
    """
    rows: dict[str, int] = {}

    def count(name: str, _module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        tensor = arguments[0]
        rows[name] += tensor.numel() // max(1, tensor.shape[-1])

    with contextlib.ExitStack() as stack:
        for name, quantizer in quantizers.enabled(model):
            rows[name] = 0
            handle = quantizer.register_forward_pre_hook(partial(count, name))
            stack.callback(handle.remove)
        yield rows


def settle_zeros(model: torch.nn.Module) -> None:
    """Give a scale to what was zero throughout: the weight of an identity layer, what it returns.

    Zero is exact with any scale, so a maximum of zero becomes that of a scale of one.
    """
    for name, quantizer in quantizers.enabled(model):
        amax = getattr(quantizer, "_amax", None)
        if amax is not None and quantizers.needs_amax(quantizer) and bool((amax == 0).any()):
            if not amax.any():
                logger.warning("%s was zero throughout: its scale is 1", global_name(model, name))
            amax.masked_fill_(amax == 0, quantizer.maxbound)


def check_scales(
    model: torch.nn.Module, rows: Mapping[str, int], *, dynamic_inputs: bool = False
) -> None:
    """Raise UsageError, on every rank, if an enabled quantizer has no usable scale.

    An expert that no token chose needs a scale too (:func:`experts.settle_idle`); that its
    quantizers are used is seen by other experts of the layer.

    Args:
        model: this rank's part, calibrated.
        rows: how many rows each quantizer saw (:func:`watching`).
        dynamic_inputs: the recipe has no calibration, so inputs without a stored maximum take
            their own; weights never do.
    """
    in_use = {experts.layer_name(model, name) for name, count in rows.items() if count}
    in_use = in_use.union(*from_all_ranks(in_use))
    broken = []
    for name, quantizer in quantizers.enabled(model):
        problem = ""
        if quantizers.needs_amax(quantizer) and ("weight_quantizer" in name or not dynamic_inputs):
            problem = _scale_problem(getattr(quantizer, "_amax", None))
        if experts.layer_name(model, name) not in in_use and name in rows:
            problem = "the layer's forward pass does not use it"
        if problem:
            broken.append(f"{global_name(model, name)} ({problem})")
    found = list(dict.fromkeys(each for part in from_all_ranks(broken) for each in part))
    if found:
        raise UsageError(
            f"{len(found)} quantizers without a usable scale",
            first_names(found),
            "give calibration data that reaches these layers (--calib-size, "
            "--calib-dataset-path-or-name), or leave them out in a recipe",
        )


def _scale_problem(amax: torch.Tensor | None) -> str:
    if amax is None:
        return "it saw no data"
    highest, lowest = float(amax.float().max()), float(amax.float().min())
    if not (math.isfinite(highest) and math.isfinite(lowest)):
        return f"its maximum is {highest}"
    return "" if lowest > 0 else f"its maximum is {lowest:g}"
