"""Run by test_memory_gpu.py: calibration on a GPU of which the process may use a small part.

    python tests/helpers/memory_worker.py OUTPUT.pt --pretrained-model-path ...

The limit is the allocator's own (``set_per_process_memory_fraction``), which the number of free
bytes does not show: the pass that is chosen by it runs out of memory.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from batching_worker import FLAG
from quantization_worker import Model

from post_training.cli.stage import open_session
from post_training.config import arguments
from post_training.inference.batching import Batching
from post_training.quantization.formats import registry as formats
from post_training.quantization.options import QuantizeOptions

ROOM = 400 << 20  # bytes beyond what the model takes


def calibrated(build: Model, asked: int | str, *, limited: bool = False) -> dict[str, Any]:
    from post_training.quantization import ptq, quantizers
    from post_training.quantization.calibration import Calibration

    model = build.plain()
    data = Calibration(build.samples, Batching(asked, FLAG))
    torch.cuda.empty_cache()
    if limited:
        total = torch.cuda.get_device_properties(0).total_memory
        room = torch.cuda.memory_reserved() + ROOM
        torch.cuda.set_per_process_memory_fraction(room / total)
    try:
        ptq.with_format(model, build.options, formats.FORMATS["FP8_DEFAULT_CFG"], data)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    return {
        "scales": {name: each.amax.float().cpu() for name, each in quantizers.enabled(model)},
        "tokens": data.tokens,
        "largest": data.batching.largest,
        "halved": data.batching.halved,
    }


def main() -> None:
    output, *words = sys.argv[1:]
    options = arguments.parse("quantize", QuantizeOptions, words)
    with open_session(options) as session:
        build = Model(words, options, session)
        results = {
            "one": calibrated(build, 1),
            "auto": calibrated(build, "auto"),
            "limited": calibrated(build, "auto", limited=True),
        }
        torch.save(results, output)


if __name__ == "__main__":
    main()
