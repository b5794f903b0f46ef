"""Which quantized weights of Hugging Face folders can be read, by ``quant_method``. No torch.

``checkpoints/dequantize.py`` has the reader of each method that is listed here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from post_training.common.errors import UsageError


def _block_fp8(quantization: Mapping[str, Any]) -> str:
    """Why FP8 weights of this kind cannot be read; empty if they can."""
    blocks = quantization.get("weight_block_size")
    if not (isinstance(blocks, list) and len(blocks) == 2 and all(blocks)):
        return "it states no weight_block_size, such as [128, 128]"
    if quantization.get("fmt", "e4m3") != "e4m3":
        return "only fmt e4m3 is read"
    return ""


# quant_method -> why weights that are described so cannot be read; empty: they can.
READABLE: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "fp8": _block_fp8,
    "mxfp4": lambda _: "",
}
# What to do with the weights of a method that is not read.
_REMEDIES = {
    "awq": "take the unquantized (BF16) release of the model",
    "gptq": "take the unquantized (BF16) release of the model",
    "compressed-tensors": "take the unquantized (BF16) release of the model, or save it with "
    "transformers after loading it with run_compressed=False",
    "modelopt": "take the model that it was quantized from, or the checkpoint that it was "
    "exported from",
}


def refuse_unreadable(quantization: Mapping[str, Any], source: str) -> None:
    """Raise UsageError for weights that are quantized in a way that is not read.

    Args:
        quantization: content of ``quantization_config``; empty for plain weights.
        source: the file that it is from.
    """
    if not quantization:
        return
    method = quantization.get("quant_method") or "unknown method"
    reason = "converting them would read codes as values"
    if method in READABLE:
        found = READABLE[method](quantization)
        if not found:
            return
        reason = found
    detail = quantization.get("quant_algo") or quantization.get("format") or quantization.get("fmt")
    if quantization.get("bits"):
        detail = f"{quantization['bits']} bits"
    shown = f"{method} ({detail})" if detail else method
    raise UsageError(
        f"{source}: quantization_config with quant_method {shown}",
        f"the weights are already quantized, and {reason}",
        _REMEDIES.get(
            method, "take the unquantized (BF16) release of the model, or dequantize it first"
        ),
    )
