"""SGLang, as far as its source names the algorithm."""

from __future__ import annotations

from post_training.quantization.engines.base import Engine, Support

SGLANG = Engine(
    name="SGLang",
    version="0.5.23",
    loader="sglang/srt/layers/quantization/modelopt_quant.py",
    algorithms={
        "FP8": Support(native=("Ada", "Hopper", "Blackwell")),
        "NVFP4": Support(native=("Blackwell",)),
    },
)
