"""Rounding to the small number formats of block quantization, in plain PyTorch.

The rules are those of ModelOpt's CUDA code (``kernels/quantization/gemm/tensor_quant_mx.{h,cu}``
and ``fp4_kernel*.py`` of ModelOpt 0.47), so that quantization on the CPU and on a GPU agree:
round to nearest, ties to the even code (E3M0: away from zero), saturate at the largest value.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

__all__ = ["FORMATS", "Format", "power_of_two_scale"]


@dataclass(frozen=True)
class Format:
    """A number format.

    Attributes:
        name: as in the OCP microscaling specification.
        largest: the largest magnitude.
        native: the torch type to cast to, if there is one.
        magnitudes: all magnitudes in ascending order, if there is no torch type.
        ties_away: ties go away from zero instead of to the even code.
    """

    name: str
    largest: float
    native: torch.dtype | None = None
    magnitudes: tuple[float, ...] = ()
    ties_away: bool = False
    _tables: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = field(
        default_factory=dict, compare=False, repr=False
    )

    def round(self, values: torch.Tensor) -> torch.Tensor:
        """The nearest representable values: float32 to float32, any shape. NaN saturates, except
        in formats that have one."""
        if self.native is not None:
            clamped = values.clamp(-self.largest, self.largest)
            return clamped.to(self.native).float()
        if not self.magnitudes:
            return values.round().clamp(-self.largest, self.largest)
        magnitudes, bounds = self._table(values.device)
        absolute = values.abs().nan_to_num(nan=self.largest, posinf=self.largest).contiguous()
        index = torch.searchsorted(bounds, absolute, right=self.ties_away, out_int32=True)
        if not self.ties_away:
            # searchsorted takes a tie down; from an odd code it has to go up.
            at_bound = bounds[index.clamp(max=len(bounds) - 1)] == absolute
            index = index + (at_bound & (index % 2 == 1)).int()
        return torch.where(values < 0, -magnitudes[index], magnitudes[index])

    def _table(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        if device not in self._tables:
            magnitudes = torch.tensor(self.magnitudes, dtype=torch.float32, device=device)
            self._tables[device] = magnitudes, (magnitudes[1:] + magnitudes[:-1]) / 2
        return self._tables[device]


def _table_format(name: str, exponent: int, mantissa: int, bias: int) -> Format:
    """A format without infinities: subnormals, then 2**(e - bias) * (1 + m / 2**mantissa)."""
    steps = 2**mantissa
    magnitudes = [2.0 ** (1 - bias) * m / steps for m in range(steps)]
    for e in range(1, 2**exponent):
        magnitudes += [2.0 ** (e - bias) * (1 + m / steps) for m in range(steps)]
    return Format(name, magnitudes[-1], magnitudes=tuple(magnitudes))


# By ModelOpt's num_bits: (exponent bits, mantissa bits), or 8 for integers.
FORMATS: dict[tuple[int, int] | int, Format] = {
    (4, 3): Format("E4M3", 448.0, native=torch.float8_e4m3fn),
    (5, 2): Format("E5M2", 57344.0, native=torch.float8_e5m2),
    8: Format("INT8", 127.0),
    (2, 1): _table_format("E2M1", 2, 1, bias=1),
    (3, 2): _table_format("E3M2", 3, 2, bias=3),
    (2, 3): _table_format("E2M3", 2, 3, bias=1),
    (1, 2): _table_format("E1M2", 1, 2, bias=0),
    (0, 3): Format("E0M3", 7.0, magnitudes=tuple(float(m) for m in range(8))),
    (3, 0): Format("E3M0", 16.0, magnitudes=(0, 0.25, 0.5, 1, 2, 4, 8, 16), ties_away=True),
}


def power_of_two_scale(amax: torch.Tensor, element: Format) -> torch.Tensor:
    """The E8M0 scale of each block: the least power of two that brings ``amax`` (float32, any
    shape) into the element's range; 1 for blocks of zeros and for those with infinities or NaN."""
    ratio = amax / element.largest
    # frexp gives ratio = fraction * 2**exponent with fraction in [0.5, 1).
    fraction, exponent = torch.frexp(ratio)
    exponent = torch.where(fraction == 0.5, exponent - 1, exponent).clamp(-127, 127)
    usable = (amax > 0) & torch.isfinite(amax)
    return torch.where(usable, torch.ldexp(torch.ones_like(ratio), exponent), 1.0)
