"""Matrix products and casts under the names of the compiled extension.

The linears call :func:`general_gemm` through their own module, where ModelOpt replaces it to
quantize the operands.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch

__all__ = ["cast_to_fp8", "general_gemm"]


def general_gemm(
    A: torch.Tensor,  # noqa: N803 -- keyword names of the real package
    B: torch.Tensor,  # noqa: N803
    workspace: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    quantization_params: Any = None,
    gelu: Any = None,
    gelu_in: Any = None,
    accumulate: bool = False,
    layout: str = "TN",
    out: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    use_split_accumulator: bool = False,
    grad: bool = False,
    **overlap: Any,
) -> tuple[torch.Tensor, torch.Tensor | None, None, None]:
    """A product in column-major terms, as cuBLAS sees it: ``out = op(B) @ op(A)``.

    ``layout`` gives op for A, then B: with row-major tensors "TN" is ``B @ A.T`` (forward:
    A = weight [out, in], B = input [..., in]), "NN" is ``B @ A`` (gradient of the input) and "NT"
    is ``B.T @ A`` (gradient of the weight, leading dimensions flattened).

    Returns:
        (out, gradient of the bias if ``grad`` and a bias is given, None, None).

    Raises:
        NotImplementedError: for fused GELU, quantized outputs and communication overlap.
        ValueError: for another layout.
    """
    if quantization_params is not None or gelu or gelu_in is not None:
        raise NotImplementedError("general_gemm of the stand-in: no fused GELU, no quantization")
    if any(value not in (None, False) for value in overlap.values()):
        raise NotImplementedError(f"general_gemm of the stand-in: no {', '.join(overlap)}")
    if layout == "TN":
        if bias is not None and not grad and bias.dtype == B.dtype:
            result = torch.nn.functional.linear(B, A, bias)
        else:
            result = torch.nn.functional.linear(B, A)
            if bias is not None and not grad:
                result = result + bias
    elif layout == "NN":
        result = B.matmul(A)
    elif layout == "NT":
        result = B.flatten(0, -2).t().matmul(A.flatten(0, -2))
    else:
        raise ValueError(f"general_gemm of the stand-in: layout {layout!r}")
    bias_gradient = None
    if grad and bias is not None:
        bias_gradient = B.flatten(0, -2).sum(0).to(bias.dtype)
    if out_dtype is not None:
        result = result.to(out_dtype)
    if out is not None:
        result = out.add_(result) if accumulate else out.copy_(result)
    return result, bias_gradient, None, None


def cast_to_fp8(*args: Any, **kwargs: Any) -> NoReturn:
    raise NotImplementedError(
        "the pure-PyTorch stand-in for Transformer Engine does not store FP8 tensors"
    )
