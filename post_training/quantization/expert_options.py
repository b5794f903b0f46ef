"""What the command line says about experts while the model is quantized. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

from post_training.common.errors import UsageError
from post_training.config.flags import flag, spelled
from post_training.models.architecture import Architecture

ROUTED, ALL = "routed", "all"


def _is_mode(option: str, value: str) -> None:
    if value not in (ROUTED, ALL) and not 0 < _number(value) <= 1:
        raise UsageError(
            f"{option} {value}",
            "which experts get a calibration token is not a share from 0 to 1, nor a word for one",
            f"give {ROUTED}, {ALL}, or the share of the experts, such as 0.5",
        )


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


@dataclass(frozen=True, kw_only=True)
class ExpertOptions:
    TITLE: ClassVar[str] = "experts"

    moe_calibrate: str = flag(
        ROUTED,
        metavar="routed|all|RATIO",
        check=_is_mode,
        help="experts that each calibration token reaches: those that the router chooses, all, or "
        "the best of a share, such as 0.5 (%(default)s)",
    )
    sync_expert_weight_amax: bool = flag(
        False, help="give all experts of a layer the same weight scale"
    )

    @property
    def share(self) -> float:
        """Of a layer's experts, that each calibration token reaches; 0: the router's choice."""
        return {ROUTED: 0.0, ALL: 1.0}.get(self.moe_calibrate) or _number(self.moe_calibrate)


_FLAGS = tuple(field.name for field in dataclasses.fields(ExpertOptions))


class _WithExperts(Protocol):
    """A stage's options that hold these."""

    @property
    def given(self) -> Mapping[str, Any]: ...

    @property
    def experts(self) -> ExpertOptions: ...

    def noting(self, notice: str) -> Self: ...


def reached(share: float, experts: int, chosen: int) -> int:
    """How many experts of a layer a token reaches; ``chosen``, as ModelOpt has it, at least."""
    return max(chosen, round(experts * share))


def noting[Options: _WithExperts](options: Options, architecture: Architecture) -> Options:
    """``options`` with what there is to say about given flags without an effect on the model."""
    names = [name for name in _FLAGS if name in options.given]
    values, share = architecture.resolved(), options.experts.share
    total, chosen = values["num_moe_experts"], values["moe_router_topk"]
    if names and not total:
        flags = ", ".join(map(spelled, names))
        return options.noting(f"unused, as the model has no experts: {flags}")
    if total and share and reached(share, total, chosen) == chosen:
        return options.noting(
            f"--moe-calibrate {options.experts.moe_calibrate} changes nothing: the router sends "
            f"each token to {chosen} of {total} experts"
        )
    return options
