"""Weights with NaN or infinite values, or negative scales, are refused where they are loaded.

Nothing later would say so: one NaN makes every logit NaN, of which argmax takes the first, so that
a model that is broken scores like one that always answers A.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open

from post_training.common.errors import UsageError

if TYPE_CHECKING:
    import torch
    from megatron.core.transformer import MegatronModule


def check_model(model: MegatronModule, what: str, source: Path | None = None) -> None:
    """Check the parameters and buffers of all ranks; a collective call.

    One pass over the weights at the speed of memory.

    Args:
        model: this rank's part.
        what: was loaded, in the message (``checkpoint <path>``).
        source: the Hugging Face folder it was loaded from, whose tensor is then named.

    Raises:
        UsageError: names the tensor, and the place of the first such value in it.
    """
    from post_training.distributed import collectives

    named = [*model.named_parameters(), *model.named_buffers()]
    found = collectives.first_failure(describe_not_finite(named) or _describe_negative(named))
    if found is None:
        return
    cause = f"its tensor {found}"
    if source is not None:
        in_source = collectives.on_first_rank(lambda: _describe_source(source))
        # Not in the source: a value that the model's precision cannot hold.
        cause = f"its tensor {in_source}" if in_source else f"in this precision, {found}"
    raise UsageError(
        what,
        cause,
        "get the weights again, or, if it is the precision (--fp16), use --bf16",
    )


def describe_not_finite(named: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """Of the first tensor with NaN or infinite values: its name, and where. None without one."""
    import torch

    waiting: list[tuple[str, torch.Tensor]] = []
    sums: list[torch.Tensor] = []
    for name, tensor in named:
        if not tensor.is_floating_point() or tensor.is_meta or not tensor.numel():
            continue
        waiting.append((name, tensor))
        if tensor.element_size() == 1:  # FP8 has no sum
            sums.append(torch.where(_bad_values(tensor).any(), torch.nan, 0.0))
        else:
            # NaN and Inf survive a sum. So may the sum of finite values overflow: looked at below.
            sums.append(tensor.detach().sum().float())
    if not sums or torch.stack([each.cpu() for each in sums]).isfinite().all():
        return None
    for name, tensor in waiting:
        bad = _bad_values(tensor.detach())
        if bad.any():
            place = bad.nonzero()[0].tolist()
            return f"{name} has {int(bad.sum())} values that are not finite, the first at {place}"
    return None


def _describe_negative(named: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """Of the first maximum or scale of a quantizer that is negative: its name. None without one."""
    held = [
        (name, tensor.detach())
        for name, tensor in named
        if "quantizer." in name and tensor.is_floating_point() and tensor.numel()
        if name.endswith(("_amax", "_scale")) and not tensor.is_meta
    ]
    least = [tensor.float().min().cpu() for _, tensor in held]
    names = [name for (name, _), value in zip(held, least, strict=True) if value < 0]
    return f"{names[0]} is negative, which no maximum and no scale is" if names else None


def _bad_values(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    if tensor.element_size() > 1:
        return ~tensor.isfinite()
    bits = tensor.view(torch.uint8) & 0x7F
    return bits >= 0x7C if tensor.dtype == torch.float8_e5m2 else bits == 0x7F


def _describe_source(folder: Path) -> str | None:
    """The same for a Hugging Face folder, one tensor in memory at a time."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118
                if found := describe_not_finite([(name, shard.get_tensor(name))]):
                    return found
    return None
