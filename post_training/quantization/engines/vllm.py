"""vLLM."""

from __future__ import annotations

from post_training.quantization.engines.base import (
    COMPRESSED_TENSORS,
    MIXED,
    MIXED_COMPRESSED,
    READ,
    Engine,
    Support,
)

_BEFORE_BLACKWELL = ("Ampere", "Ada", "Hopper")
_ALL = (*_BEFORE_BLACKWELL, "Blackwell")
_SCHEMES = "vllm/model_executor/layers/quantization/compressed_tensors/schemes/compressed_tensors"
_COMPRESSED = "vllm/model_executor/layers/quantization/compressed_tensors/compressed_tensors.py"
_MARLIN = (64, 128)  # the tiles of its kernel for weights alone
_RUN = "run in vLLM 0.24.0 on H200, 2026-11-27"
_RUN_ON_H100 = "run in vLLM 0.24.0 on H100, 2026-11-27"
_RUN_LATER = "run in vLLM 0.24.0 on H100, 2026-11-28"

VLLM = Engine(
    target="vllm",
    name="vLLM",
    version="0.24.0",
    loader="vllm/model_executor/layers/quantization/modelopt.py",
    algorithms={
        "FP8": Support(native=("Ada", "Hopper", "Blackwell"), verified=_RUN_ON_H100),
        # Its experts have one scale a matrix.
        "FP8_PER_CHANNEL_PER_TOKEN": Support(
            native=("Ada", "Hopper", "Blackwell"), verified=_RUN_ON_H100, experts=False
        ),
        # On Blackwell the scales would have to be made powers of two first, which the loader
        # leaves out (process_weights_after_loading).
        "FP8_PB_WO": Support(
            native=("Ada", "Hopper"),
            verified=_RUN_ON_H100,
            experts=False,
            multiples=(128, 128),
            separate=True,
        ),
        "NVFP4": Support(
            native=("Blackwell",), weights_alone=_BEFORE_BLACKWELL, verified=_RUN_LATER
        ),
        "W4A16_NVFP4": Support(native=_ALL, verified=_RUN),
        # 0.24.0 lacks it among the methods that may override another (vllm/config/model.py).
        "MXFP8": Support(
            native=("Blackwell",),
            weights_alone=_BEFORE_BLACKWELL,
            version="0.33.0",
            verified=f"{READ}; 0.24.0 does not load it",
        ),
        MIXED: Support(verified=_RUN_LATER),
        # find_matched_target of utils.py takes a linear by its name. Experts are looked up by those
        # of the first one, all three of which must be alike; a search may choose otherwise.
        MIXED_COMPRESSED: Support(loader=_COMPRESSED, experts=False),
        # The kernel for Blackwell fails when the engine starts (vLLM's issue 54311).
        # Experts need scales of inputs that are found for each token.
        "INT8_W8A8": Support(
            native=_BEFORE_BLACKWELL,
            loader=f"{_SCHEMES}_w8a8_int8.py",
            verified=_RUN,
            experts=False,
            multiples=(16, 16),
        ),
        "INT8_PER_CHANNEL_PER_TOKEN": Support(
            native=_BEFORE_BLACKWELL,
            loader=f"{_SCHEMES}_w8a8_int8.py",
            verified=_RUN_LATER,
            multiples=(16, 16),
        ),
        "INT8_W8A16": Support(
            native=_ALL, loader=f"{_SCHEMES}_wNa16.py", verified=_RUN, multiples=_MARLIN
        ),
        "INT4_W4A16": Support(
            native=_ALL, loader=f"{_SCHEMES}_wNa16.py", verified=_RUN, multiples=_MARLIN
        ),
        # CUTLASS (kernels/linear/mixed_precision/cutlass.py); it gives 16 bits as bfloat16 alone.
        # Experts' scales are rounded by the same function (fused_moe/oracle/w4a8.py), and hidden
        # size and expert's size asserted (compressed_tensors_moe_w4a8_fp8.py).
        "INT4_W4A8": Support(
            native=("Hopper",),
            loader=f"{_SCHEMES}_w4a8_fp8.py",
            verified=_RUN_LATER,
            multiples=(128, 128),
            expert_multiples=(256, 256),
        ),
        # Experts by compressed_tensors_moe_w4a4_mxfp4.py; Marlin takes these multiples of them.
        "MXFP4": Support(
            native=("Blackwell",),
            weights_alone=_BEFORE_BLACKWELL,
            loader=f"{_SCHEMES}_w4a4_mxfp4.py",
            verified=_RUN_LATER,
            expert_multiples=(128, 64),
        ),
        # The same scheme: on Blackwell FlashInfer's kernel would round the inputs.
        "W4A16_MXFP4": Support(
            native=_BEFORE_BLACKWELL,
            loader=f"{_SCHEMES}_w4a4_mxfp4.py",
            verified=_RUN_LATER,
            expert_multiples=(128, 64),
        ),
    },
    # A layer of any other algorithm would silently be read as an unquantized one; in the layout of
    # compressed-tensors a group of linears names its own.
    mixtures={
        MIXED: frozenset(("FP8", "NVFP4", "W4A16_NVFP4")),
        MIXED_COMPRESSED: COMPRESSED_TENSORS - {MIXED_COMPRESSED},
    },
    kv_caches=frozenset(("FP8", "NVFP4")),
    # CompressedTensorsKVCacheMethod; the names are those of maybe_remap_kv_scale_name.
    compressed_kv_caches=frozenset(("FP8",)),
    # gemma3.py ties the output layer by a method that ModelOpt's classes of layers lack
    # (NotImplementedError of QuantizeMethodBase.tie_weights when the engine starts).
    not_modelopt={"Gemma3ForCausalLM": "its Gemma 3 cannot tie embeddings beside ModelOpt's form"},
)
