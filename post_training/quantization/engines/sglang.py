"""SGLang, as far as its source names the algorithm."""

from __future__ import annotations

from post_training.quantization.engines.base import GENERATIONS, Engine, Support

_COMPRESSED = "sglang/srt/layers/quantization/compressed_tensors/compressed_tensors.py"
_HERE = "0.5.15.post1"  # that was run
_RUN = f"run in SGLang {_HERE} on H100, 2026-11-28"

SGLANG = Engine(
    target="sglang",
    name="SGLang",
    version="0.5.23",
    loader="sglang/srt/layers/quantization/modelopt_quant.py",
    algorithms={
        "FP8": Support(native=("Ada", "Hopper", "Blackwell"), version=_HERE, verified=_RUN),
        "NVFP4": Support(
            native=("Blackwell",),
            weights_alone=("Ampere", "Ada", "Hopper"),
            version=_HERE,
            verified=_RUN,
        ),
        # Not INT8_W8A8: a linear of several parts has room for the input scale of one, and the
        # scale of each token is taken anyway (schemes/compressed_tensors_w8a8_int8.py).
        "INT8_PER_CHANNEL_PER_TOKEN": Support(
            native=("Ampere", "Ada", "Hopper"),
            loader=_COMPRESSED,
            version=_HERE,
            verified=_RUN,
            experts=False,
        ),
        "INT8_W8A16": Support(native=GENERATIONS, loader=_COMPRESSED, version=_HERE, verified=_RUN),
        # With one group of 128, six of 50 answers were others, by logits far apart; with two, none.
        "INT4_W4A16": Support(
            native=GENERATIONS,
            loader=_COMPRESSED,
            version=_HERE,
            verified=_RUN,
            expert_inputs=256,
        ),
    },
    # A mixture without NVFP4 is taken for INT4 with FP8 inputs (configs/model_config.py).
    kv_caches=frozenset(("FP8",)),
    # What a draft reads is kept where it enters a layer (models/qwen2.py, llama.py).
    last_layer=False,
)
