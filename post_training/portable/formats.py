"""Rounding to the small number formats of block quantization, in plain PyTorch.

The rules are those of ModelOpt's CUDA code (``kernels/quantization/gemm/tensor_quant_mx.{h,cu}``
and ``fp4_kernel*.py`` of ModelOpt 0.47), so that quantization on the CPU and on a GPU agree:
round to nearest, ties to the even code (E3M0: away from zero), saturate at the largest value.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_EXPONENT_BITS = 0x7F800000


@dataclass(frozen=True)
class ElementFormat:
    """A number format. Values from 2**(e) to 2**(e + 1) lie 2**(e - mantissa) apart.

    Attributes:
        name: as in the OCP microscaling specification.
        largest: the largest magnitude.
        native: the torch type to cast to, if there is one.
        mantissa: number of mantissa bits.
        lowest: the exponent below which the distance no longer falls (subnormal numbers).
        ties_away: ties go away from zero instead of to the even code.
    """

    name: str
    largest: float
    native: torch.dtype | None = None
    mantissa: int = 0
    lowest: int = 0
    ties_away: bool = False

    def round(self, values: torch.Tensor) -> torch.Tensor:
        """The nearest representable values: float32 to float32, any shape. NaN stays NaN."""
        if self.native is not None:
            return values.clamp(-self.largest, self.largest).to(self.native).float()
        clamped = values.clamp(-self.largest, self.largest)
        # 2**floor(log2(|x|)): the float with the same exponent and no mantissa.
        power = (clamped.view(torch.int32) & _EXPONENT_BITS).view(torch.float32)
        step = power.clamp_(min=2.0**self.lowest).mul_(2.0**-self.mantissa)
        codes = clamped / step
        if self.ties_away:
            whole = codes.trunc()
            codes = whole + codes.sign() * ((codes - whole).abs() >= 0.5)
        else:
            codes.round_()
        return codes.mul_(step)


# By ModelOpt's num_bits: (exponent bits, mantissa bits), or 8 for integers.
ELEMENT_FORMATS: dict[tuple[int, int] | int, ElementFormat] = {
    (4, 3): ElementFormat("E4M3", 448.0, native=torch.float8_e4m3fn),
    (5, 2): ElementFormat("E5M2", 57344.0, native=torch.float8_e5m2),
    8: ElementFormat("INT8", 127.0, mantissa=6, lowest=6),
    (2, 1): ElementFormat("E2M1", 6.0, mantissa=1, lowest=0),
    (3, 2): ElementFormat("E3M2", 28.0, mantissa=2, lowest=-2),
    (2, 3): ElementFormat("E2M3", 7.5, mantissa=3, lowest=0),
    (1, 2): ElementFormat("E1M2", 3.5, mantissa=2, lowest=1),
    (0, 3): ElementFormat("E0M3", 7.0, mantissa=2, lowest=2),
    (3, 0): ElementFormat("E3M0", 16.0, mantissa=0, lowest=-2, ties_away=True),
}


def power_of_two_scale(amax: torch.Tensor, element: ElementFormat) -> torch.Tensor:
    """The E8M0 scale of each block: the least power of two that brings ``amax`` (float32, any
    shape) into the element's range; 1 for blocks of zeros and for those with infinities or NaN."""
    ratio = amax / element.largest
    # frexp gives ratio = fraction * 2**exponent with fraction in [0.5, 1).
    fraction, exponent = torch.frexp(ratio)
    exponent = torch.where(fraction == 0.5, exponent - 1, exponent).clamp(-127, 127)
    usable = (amax > 0) & torch.isfinite(amax)
    return torch.where(usable, torch.ldexp(torch.ones_like(ratio), exponent), 1.0)
