"""vLLM."""

from __future__ import annotations

from post_training.quantization.engines.base import MIXED, Engine, Support

_BEFORE_BLACKWELL = ("Ampere", "Ada", "Hopper")

VLLM = Engine(
    name="vLLM",
    version="0.24",
    loader="vllm/model_executor/layers/quantization/modelopt.py",
    algorithms={
        "FP8": Support(native=("Ada", "Hopper", "Blackwell")),
        "NVFP4": Support(native=("Blackwell",), weights_alone=_BEFORE_BLACKWELL),
        "W4A16_NVFP4": Support(native=(*_BEFORE_BLACKWELL, "Blackwell")),
        "MXFP8": Support(native=("Blackwell",), weights_alone=_BEFORE_BLACKWELL),
        MIXED: Support(),
    },
    # A layer of any other algorithm would silently be read as an unquantized one.
    mixes=frozenset(("FP8", "NVFP4", "W4A16_NVFP4")),
)
