"""TensorRT-LLM, as far as its source names the algorithm."""

from __future__ import annotations

from post_training.quantization.engines.base import MIXED, Engine, Support

TENSORRT_LLM = Engine(
    target="trtllm",
    name="TensorRT-LLM",
    version="main, 2026-11",
    loader="tensorrt_llm/_torch/modules/linear.py",
    algorithms={
        "FP8": Support(native=("Ada", "Hopper", "Blackwell")),
        "NVFP4": Support(native=("Blackwell",)),
        MIXED: Support(loader="tensorrt_llm/_torch/model_config.py"),
    },
    mixes=frozenset(("FP8", "NVFP4")),
    kv_caches=frozenset(("FP8", "NVFP4")),
)
