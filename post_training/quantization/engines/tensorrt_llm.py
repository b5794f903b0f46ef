"""TensorRT-LLM, as far as its source names the algorithm."""

from __future__ import annotations

from post_training.quantization.engines.base import GENERATIONS, MIXED, Engine, Support

TENSORRT_LLM = Engine(
    target="trtllm",
    name="TensorRT-LLM",
    version="main, 2026-11",
    loader="tensorrt_llm/_torch/modules/linear.py",
    algorithms={
        "FP8": Support(native=("Ada", "Hopper", "Blackwell")),
        "NVFP4": Support(native=("Blackwell",)),
        # Weights are interleaved in tiles of 64 (quantization/functional.py); of experts it reads
        # other forms, and scales of keys and values beside FP8 and NVFP4 alone.
        "W8A16": Support(
            native=GENERATIONS, experts=False, multiples=(64, 64), kv_cache=False, special=False
        ),
        "W4A16_AWQ": Support(
            native=GENERATIONS, experts=False, multiples=(64, 128), kv_cache=False, special=False
        ),
        # Kernels that multiply FP8 exist for Hopper and, from CUDA 12.4 on, for Ada
        # (fpA_intB_gemm_template.h, CutlassFpAIntBGemmRunner.dispatch_to_arch).
        "W4A8_AWQ": Support(
            native=("Ada", "Hopper"),
            experts=False,
            multiples=(64, 128),
            kv_cache=False,
            special=False,
        ),
        MIXED: Support(loader="tensorrt_llm/_torch/model_config.py"),
    },
    # ModelOpt's layout: its reader of compressed-tensors takes INT8 for FP8.
    stored_as={"INT8_W8A16": "W8A16", "INT4_W4A16": "W4A16_AWQ"},
    mixtures={MIXED: frozenset(("FP8", "NVFP4"))},
    kv_caches=frozenset(("FP8", "NVFP4")),
)
