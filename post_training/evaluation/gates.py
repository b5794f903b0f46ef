"""Bounds that an evaluation must keep; a broken one ends the stage with code 1. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from post_training.common.errors import UsageError, suggest
from post_training.config import checks
from post_training.config.flags import flag

EVERY = "*"  # the name of a bound that holds for every measure


def bounds(option: str, words: Sequence[str]) -> dict[str, float]:
    """``0.6 gsm8k_strict=0.5`` by measure; :data:`EVERY` for a number alone.

    Raises:
        UsageError: for what is no number from 0 to 1, and for two bounds of one measure.
    """
    found: dict[str, float] = {}
    for word in words:
        name, _, number = word.rpartition("=")
        if (name or EVERY) in found:
            cause = "a second bound of the same"
            raise UsageError(f"{option} {' '.join(words)}", cause, "give one of them")
        try:
            found[name or EVERY] = float(number)
        except ValueError as error:
            remedy = "give e.g. 0.6, or mmlu=0.6 gsm8k_strict=0.5"
            raise UsageError(f"{option} {word}", "it is no number", remedy) from error
        checks.fraction(f"{option} {name}".strip(), found[name or EVERY])
    return found


def _check_bounds(option: str, words: Sequence[str]) -> None:
    bounds(option, words)


def _check_kl(option: str, value: float) -> None:
    if not 0 <= value < float("inf"):
        raise UsageError(f"{option} {value}", "it is no divergence in nats", "give e.g. 0.02")


@dataclass(frozen=True, kw_only=True)
class GateOptions:
    TITLE: ClassVar[str] = "gates: exit with code 1"

    lower_bound: tuple[str, ...] | None = flag(
        metavar="[MEASURE=]X",
        check=_check_bounds,
        help="if an accuracy is below; a number alone holds for every measure",
    )
    max_drop: tuple[str, ...] | None = flag(
        metavar="[MEASURE=]X",
        check=_check_bounds,
        help="if an accuracy is by more than this below the reference's",
    )
    max_kl: float | None = flag(
        metavar="NATS",
        check=_check_kl,
        help="if the mean KL divergence of the next token from the reference is above",
    )


def check(options: GateOptions, measures: Sequence[str], reference: bool, text: bool) -> None:
    """Raise UsageError for a bound of what is not measured.

    Args:
        measures: names that the measures' names begin with.
    """
    given = {"--lower-bound": options.lower_bound, "--max-drop": options.max_drop}
    for option, words in given.items():
        if not words:
            continue
        if not measures:
            remedy = "add --mmlu-dataset, --gsm8k-dataset or --tasks"
            raise UsageError(f"{option} {' '.join(words)}", "no accuracy is measured", remedy)
        for name in bounds(option, words):
            if name != EVERY and not any(name.startswith(each) for each in measures):
                hint = suggest(name, measures) or f"measured are {', '.join(measures)}"
                raise UsageError(f"{option} {name}", "no such measure is taken", hint)
    if options.max_kl is not None and not text:
        cause = "the divergence is of text, and none is given"
        raise UsageError(f"--max-kl {options.max_kl}", cause, "add --text FILE")
    needing = {"--max-drop": options.max_drop, "--max-kl": options.max_kl}
    needed = next((name for name, value in needing.items() if value not in (None, ())), None)
    if needed and not reference:
        cause = "there is nothing to compare with"
        raise UsageError(needed, cause, "set REFERENCE_CKPT (--reference) to the model before")


def broken(options: GateOptions, content: Mapping[str, Any]) -> list[str]:
    """A line for each bound that the report's figures do not keep."""
    found = list(_low(options, content["measures"]))
    kl = content.get("text", {}).get("kl", {}).get("mean")
    if options.max_kl is not None and not (kl is not None and kl <= options.max_kl):
        found.append(f"mean KL divergence {kl:.6f} is above --max-kl {options.max_kl}")
    return found


def _low(options: GateOptions, measures: Mapping[str, Any]) -> Iterator[str]:
    for name, bound, entry in _matched("--lower-bound", options.lower_bound, measures):
        accuracy = entry["model"]["accuracy"]
        if not accuracy >= bound:
            yield f"{name} accuracy {accuracy:.4f} is below --lower-bound {bound:.4f}"
    for name, bound, entry in _matched("--max-drop", options.max_drop, measures):
        drop = -entry["difference"]["difference"]
        if not drop <= bound:
            yield f"{name} accuracy dropped by {drop:.4f}, more than --max-drop {bound:.4f}"


def _matched(
    option: str, words: Sequence[str] | None, measures: Mapping[str, Any]
) -> Iterator[tuple[str, float, Mapping[str, Any]]]:
    """Each measure with its bound; one of its own wins over that of every measure."""
    wanted = bounds(option, words or ())
    for name in wanted.keys() - measures.keys() - {EVERY}:
        remedy = f"measured were {', '.join(measures)}"
        raise UsageError(f"{option} {name}", "no such measure was taken", remedy)
    for name, entry in measures.items():
        if name in wanted or EVERY in wanted:
            yield name, wanted.get(name, wanted.get(EVERY, 0.0)), entry
