"""SGLang, as far as its source names the algorithm."""

from __future__ import annotations

from post_training.quantization.engines.base import GENERATIONS, Engine, Support

_COMPRESSED = "sglang/srt/layers/quantization/compressed_tensors/compressed_tensors.py"

SGLANG = Engine(
    target="sglang",
    name="SGLang",
    version="0.5.23",
    loader="sglang/srt/layers/quantization/modelopt_quant.py",
    algorithms={
        "FP8": Support(native=("Ada", "Hopper", "Blackwell")),
        "NVFP4": Support(native=("Blackwell",)),
        "INT8_W8A8": Support(native=("Ampere", "Ada", "Hopper"), loader=_COMPRESSED),
        "INT8_W8A16": Support(native=GENERATIONS, loader=_COMPRESSED),
        "INT4_W4A16": Support(native=GENERATIONS, loader=_COMPRESSED),
    },
    # A mixture without NVFP4 is taken for INT4 with FP8 inputs (configs/model_config.py).
    kv_caches=frozenset(("FP8",)),
)
