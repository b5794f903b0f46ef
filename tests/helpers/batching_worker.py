"""Run by test_batching.py: calibration, loss and tokens with passes of several sizes.

    python tests/helpers/batching_worker.py OUTPUT.pt --pretrained-model-path ...

Memory that runs out is real where it can be limited (address space of this process, a plain
computation), and raised by a layer where a model computes.
"""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from quantization_worker import Model

from post_training.cli.stage import open_session
from post_training.common.errors import UsageError
from post_training.config import arguments
from post_training.data.text_windows import Window
from post_training.evaluation import mmlu, perplexity, text_scores
from post_training.evaluation.mmlu_data import Benchmark
from post_training.evaluation.mmlu_prompts import Question
from post_training.inference import generation
from post_training.inference.batching import Batching
from post_training.quantization.formats import registry as formats
from post_training.quantization.options import QuantizeOptions

FLAG, MODEL = "--calib-batch-size", ("--pretrained-model-path",)
PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6], [5, 3], [5, 8, 9], [7, 9]]
ROOM = 96 << 20  # bytes of address space beyond what the process has


@contextlib.contextmanager
def scarce(model: Any, most: int) -> Iterator[list[int]]:
    """The model's last layer runs out of memory with more than ``most`` sequences."""
    refused: list[int] = []

    def refuse(_module: Any, given: Any, kwargs: Any) -> None:
        hidden = given[0] if given else kwargs["hidden_states"]
        if hidden.shape[1] > most:
            refused.append(hidden.shape[1])
            raise torch.OutOfMemoryError("CUDA out of memory (raised by a test)")

    # In a linear layer, where ModelOpt has replaced functions when it is raised.
    layer = model.decoder.layers[-1]
    handle = layer.register_forward_pre_hook(refuse, with_kwargs=True)
    inner = layer.self_attention.linear_proj

    def refuse_inside(_module: Any, given: Any) -> None:
        refuse(_module, given, {})

    other = inner.input_quantizer.register_forward_pre_hook(refuse_inside)
    handle.remove()
    try:
        yield refused
    finally:
        other.remove()


def calibrated(build: Model, asked: int | str, most: int = 0) -> dict[str, Any]:
    """Every scale, what experts got, and the sizes of the passes."""
    from post_training.quantization import ptq, quantizers
    from post_training.quantization.calibration import Calibration

    model = build.plain()
    batching = Batching(asked, FLAG)
    data = Calibration(build.samples, batching)
    options = build.changed(export_kv_cache_quant="fp8")
    row = formats.FORMATS["FP8_DEFAULT_CFG"]
    refused: list[int] = []
    with contextlib.ExitStack() as stack:
        if most:
            original = Calibration.__call__

            def scarce_call(self: Calibration, given: torch.nn.Module) -> None:
                with scarce(given, most) as found:
                    original(self, given)
                refused.extend(found)

            stack.callback(setattr, Calibration, "__call__", original)
            Calibration.__call__ = scarce_call  # type: ignore[method-assign]
        ptq.with_format(model, options, row, data)
    return {
        "scales": {name: each.amax for name, each in quantizers.enabled(model)},
        "experts": dict(data.expert_tokens),
        "tokens": data.tokens,
        "largest": batching.largest,
        "halved": batching.halved,
        "refused": refused,
    }


def with_real_limit(model: Any) -> dict[str, Any]:
    """Rows of 8 MB where the process may take 96 MB more: the allocator itself refuses."""
    batching = Batching("auto", FLAG)
    batching._positions = 10**9  # what was measured was wrong
    rows = list(range(40))

    def compute(some: list[int]) -> float:
        return float(torch.ones(len(some), 1 << 21).sum())

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, before[1]))
    try:
        found = list(batching.over(model, rows, compute, positions=lambda _: 1))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    return {
        "rows": [row for some, _ in found for row in some],
        "sums": [total / len(some) for some, total in found],
        "halved": batching.halved,
        "largest": batching.largest,
    }


def refusals(model: Any) -> dict[str, str]:
    def fail(_some: Any) -> None:
        raise torch.OutOfMemoryError("raised by a test")

    found = {}
    for name, asked in (("given", 4), ("single", "auto")):
        try:
            list(Batching(asked, FLAG).over(model, range(4), fail, positions=lambda _: 10**6))
        except UsageError as error:
            found[name] = str(error)
    return found


@contextlib.contextmanager
def kept_logits() -> Iterator[list[list[float]]]:
    """The letters' logits of each question that is asked in the block."""
    found: list[list[float]] = []
    original = generation.last_logits

    def keep(*given: Any) -> torch.Tensor:
        result = original(*given)
        found.extend(result.tolist())
        return result

    generation.last_logits = keep
    try:
        yield found
    finally:
        generation.last_logits = original


def by_length(folder: Path, words: list[str], session: Any) -> dict[str, Any]:
    """Texts and questions around the length from which on this model's tokens are rotated
    otherwise, together and apart."""
    from post_training.checkpoints import loading
    from post_training.checkpoints.source import find_source

    options = arguments.parse("quantize", QuantizeOptions, [*words, *MODEL, str(folder)])
    source = find_source(options)
    model = loading.load(source, options, session)
    numbers = torch.Generator().manual_seed(2)
    lengths = range(100, 250, 10)
    rows = [torch.randint(0, 256, (n,), generator=numbers).tolist() for n in lengths]
    windows = [Window(0, row, len(row) - 1) for row in rows]
    asked = [
        Question("art", "what is it? " * (i % 9) + str(i), ("red", "green", "blue", "grey"), 0)
        for i in range(45)
    ]
    benchmark = Benchmark({"art": asked}, {})
    tokenizer = loading.tokenizer(source, options)
    found: dict[str, Any] = {}
    for size in (1, 8):
        batching = Batching(size, FLAG)
        found[f"losses, {size}"] = text_scores.score(model, None, windows, batch_size=size).loss
        with kept_logits() as logits:
            mmlu.evaluate(model, tokenizer, benchmark, batching=batching)
        found[f"logits, {size}"] = torch.tensor(sorted(logits))
    return found


def main() -> None:
    output, *words = sys.argv[1:]
    options = arguments.parse("quantize", QuantizeOptions, words)
    with open_session(options) as session:
        build = Model(words, options, session)
        model = build.plain()
        rows = build.samples.input_ids
        sizes = {"1": 1, "3": 3, "auto": "auto"}
        results = {
            "calibration": {
                **{name: calibrated(build, asked) for name, asked in sizes.items()},
                "scarce": calibrated(build, "auto", most=3),
            },
            "loss": {
                name: perplexity.mean_loss(model, rows, Batching(asked, FLAG))
                for name, asked in sizes.items()
            },
            "tokens": {
                name: generation.generate(model, PROMPTS, 8, batching=Batching(asked, FLAG))
                for name, asked in sizes.items()
            },
            "limit": with_real_limit(model),
            "refused": refusals(model),
            "by length": by_length(Path(output).with_name("long"), words, session),
        }
        torch.save(results, output)


if __name__ == "__main__":
    main()
