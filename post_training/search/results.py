"""What trials have found: their records, which of them are valid, the front, the best. No torch."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from post_training.checkpoints.source import Source
from post_training.common import manifest, redaction, validity
from post_training.common.errors import UsageError
from post_training.search.options import SearchOptions
from post_training.search.trials import Trial

logger = logging.getLogger("post_training")

TRIALS, SENSITIVITIES = "trials", "sensitivities"  # folders of a search
# Flags that decide which trials there are, how they run, or what is said of them: not a result.
_APART = frozenset(
    """
    search_dir max_size max_kl cache_tokens gpu search_formats search_kv_caches search_bits
    search_rounds no_mixtures also conf overwrite check dry_run disable_tqdm log_level no_verify
    distributed_timeout_minutes auto_quantize_formats save load pretrained_model_path
    """.split()
)


@dataclass(frozen=True)
class Result:
    """What was measured of a trial.

    Attributes:
        bytes: of the weights as they are exported.
        plain_bytes: of those of the model before.
        exact: whether they were packed to be counted; else parameters times bits.
        cache_bytes: of the keys and values that count as size.
        text: the entry of an evaluation's report.
        error: why it could not be finished; empty if it could. Nothing else counts then.
    """

    trial: Trial
    bytes: int = 0
    plain_bytes: int = 0
    exact: bool = True
    cache_bytes: float = 0.0
    bits_per_weight: float = 0.0
    text: Mapping[str, Any] | None = None
    layers: Mapping[str, str] | None = None
    error: str = ""

    @property
    def size(self) -> float:
        return self.bytes + self.cache_bytes

    @property
    def kl(self) -> float:
        """Mean divergence in nats; of nothing it may be rounded to less."""
        return max(0.0, float(self.text["kl"]["mean"])) if self.text else float("inf")

    def measured(self) -> dict[str, Any]:
        """For its manifest: what does not depend on how many tokens count."""
        names = ("bytes", "plain_bytes", "exact", "bits_per_weight", "text", "layers")
        return {name: getattr(self, name) for name in names}


def key(options: SearchOptions, trial: Trial, reference: Source) -> dict[str, Any]:
    """What decides a trial's result, beside its inputs and the versions."""
    given = {name: value for name, value in options.given.items() if name not in _APART}
    scored = asdict(options.mixtures) if trial.bits is not None else {}
    decided = {name: value for name, value in scored.items() if name not in _APART}
    found = {
        **asdict(trial),
        "given": redaction.hide_in(given),
        "mixture": decided,
        "reference": dict(reference.entry),
    }
    plain: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return plain


def folder_of(folder: Path, trial: Trial) -> Path:
    return folder / TRIALS / trial.name


def read(place: Path, wanted: Mapping[str, Any], trial: Trial, model: Source) -> Result | None:
    """The result of a trial that was made before and is still valid; else None.

    Args:
        place: its folder.
        wanted: its :func:`key`.
        model: what it quantizes.
    """
    try:
        content = manifest.read(place)
        if content is None or content.get("trial") != wanted:
            return None
        if not validity.is_valid(place, model.location):
            return None
    except UsageError as error:
        logger.info("trial %s is measured again: %s", trial.name, error.cause)
        return None
    return Result(trial, **content["metrics"])


def front(results: Sequence[Result]) -> set[str]:
    """Names of those of which none other is as small and as near, and better in one."""
    points = [(each.size, each.kl) for each in results]
    best = {
        each.trial.name
        for each, (size, kl) in zip(results, points, strict=True)
        if not any(a <= size and b <= kl and (a < size or b < kl) for a, b in points)
    }
    return best


def within(options: SearchOptions, results: Sequence[Result]) -> list[Result]:
    """Those that meet the budget."""
    size, kl = options.most_bytes, options.max_kl
    return [
        each
        for each in results
        if (size is None or each.size <= size) and (kl is None or each.kl <= kl)
    ]


def best(options: SearchOptions, results: Sequence[Result]) -> Result | None:
    """The nearest to the model before of those of a size, or the smallest of a quality."""
    found = within(options, results)
    if options.max_size is None:
        return min(found, key=lambda each: (each.size, each.kl), default=None)
    return min(found, key=lambda each: (each.kl, each.size), default=None)


def between(options: SearchOptions, results: Sequence[Result]) -> list[Trial]:
    """Mixtures halfway between the smallest that meets ``--max-kl`` and the next smaller one."""
    most = options.max_kl
    if most is None:
        return []
    kinds: dict[str, list[Result]] = {}
    for each in results:
        if each.trial.bits is not None and not each.error:
            kinds.setdefault(each.trial.kind, []).append(each)
    found = []
    for of_kind in kinds.values():
        bits = {each.trial.bits or 0.0: each.kl <= most for each in of_kind}
        good = min((number for number, meets in bits.items() if meets), default=None)
        if good is None:
            continue
        bad = max((number for number in bits if number < good), default=None)
        if bad is None:
            continue
        middle = round((good + bad) / 2, 2)
        if middle not in bits:
            one = of_kind[0].trial
            found.append(Trial(one.formats, middle, one.kv_cache, one.model))
    return found
