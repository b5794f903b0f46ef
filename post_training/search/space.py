"""What a search tries: what the engine, the GPUs, the model and the budget allow. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from post_training.checkpoints.source import Source
from post_training.common.errors import UsageError
from post_training.common.report import number_of_bytes
from post_training.quantization import options as quantization_options
from post_training.quantization.engines import registry as engines
from post_training.quantization.formats import exportable
from post_training.quantization.formats import registry as formats
from post_training.quantization.formats.base import NO_KV_CACHE, Format
from post_training.quantization.search_options import SensitivityOptions
from post_training.search.options import SearchOptions
from post_training.search.sizes import Sizes
from post_training.search.trials import Trial

_GRID = (4.75, 5.0, 5.5, 6.0, 6.5, 7.0, 8.0, 9.0, 10.0, 12.0)  # bits of mixtures
_SCALES = 0.01  # bits a weight: room for scales of whole matrices
_PLAIN = 16.0  # most bits that a mixture may have


@dataclass(frozen=True)
class Space:
    """What is tried, and what is not.

    Attributes:
        trials: those that may be within the budget, by the models' order, then small ones first.
        too_large: names of those that cannot be.
        refused: kind of trial -> why it cannot be tried.
    """

    trials: list[Trial]
    too_large: list[str]
    refused: Mapping[str, str]

    def describe(self) -> str:
        """For the log: how many of each."""
        parts = [f"{len(self.trials)} trials: {', '.join(each.name for each in self.trials)}"]
        parts += [f"{len(self.too_large)} larger than --max-size"] if self.too_large else []
        parts += [f"{len(self.refused)} kinds cannot be tried"] if self.refused else []
        return "; ".join(parts)


def sizes_of(options: SearchOptions, source: Source) -> Sizes | None:
    """Of a model; None for a hub name that is not described yet."""
    if source.described is None:
        return None
    return Sizes.of(source.described, options.precision, options.left_out)


def find(options: SearchOptions, models: Sequence[tuple[str, Source]]) -> Space:
    """The space of a search.

    Args:
        models: those of ``--also``, by their names, after the stage's own, whose name is empty.

    Raises:
        UsageError: if nothing can be tried, nothing is small enough, or a format that is named
            cannot be tried.
    """
    found: list[tuple[float, Trial]] = []
    refused: dict[str, str] = {}
    mixtures = [] if options.mixtures.no_mixtures else _mixtures(options)
    for name, source in models:
        sizes = sizes_of(options, source)
        of_model: list[tuple[float, Trial]] = []
        for trial in _wanted(options, name, sizes, mixtures):
            if reason := _refusal(options, trial, source):
                refused.setdefault(trial.kind, reason)
            else:
                of_model.append((bound(options, trial, sizes), trial))
        found += sorted(of_model, key=lambda each: each[0])
    _require(options, [trial for _, trial in found], refused)
    most = options.most_bytes
    least = min(size for size, _ in found)
    if most is not None and least > most:
        raise UsageError(
            f"--max-size {options.max_size}",
            f"the smallest that {engines.TARGETS[options.target].name} reads of this model takes "
            f"{number_of_bytes(least)}: {min(found, key=lambda each: each[0])[1].name}",
            "give more, name another engine with --target or other GPUs, or a smaller model with "
            "--also (prune.sh, then distill.sh)",
        )
    small = [trial for size, trial in found if most is None or size <= most]
    large = [trial.name for size, trial in found if trial not in small]
    return Space(small, large, refused)


def bound(options: SearchOptions, trial: Trial, sizes: Sizes | None) -> float:
    """Bytes that a trial takes at least; 0 where that is not known."""
    least = sizes.least(trial.least_bits, trial.layers) if sizes else None
    if sizes is None or least is None:
        return 0.0
    return least + sizes.cache_bytes(options.cache_tokens, trial.kv_cache)


def _wanted(
    options: SearchOptions, model: str, sizes: Sizes | None, mixtures: Sequence[tuple[str, ...]]
) -> Iterator[Trial]:
    rows = options.named_formats or [row for row in formats.FORMATS.values() if row.linear]
    for kv in _caches(options):
        yield from (Trial((row.name,), None, kv, model) for row in rows)
        for names in mixtures:
            bits = _bits(options, names, kv, sizes)
            yield from (Trial(names, each, kv, model) for each in bits)


def _caches(options: SearchOptions) -> tuple[str, ...]:
    if options.search_kv_caches:
        return tuple(dict.fromkeys(options.search_kv_caches))
    if not options.cache_tokens:
        return (NO_KV_CACHE,)
    read = engines.TARGETS[options.target].kv_caches
    found = (row.name for row in formats.KV_CACHES.values() if row.exported_as in read)
    return (NO_KV_CACHE, *found)


def _mixtures(options: SearchOptions) -> list[tuple[str, ...]]:
    """What mixtures choose from: the named formats, else those by default that run.

    Formats that an engine does not read side by side are mixed with 16 bits alone.
    """
    rows = options.mixtures.formats
    if "auto_quantize_formats" not in options.given:
        rows = [row for row in rows if not _why_not(options, row)]
    names = tuple(row.name for row in rows)
    linears = [each for row in rows for each in exportable.linears_of(row, weight_only=False)]
    together = exportable.judge(linears, target=options.target).exportable
    if together or "auto_quantize_formats" in options.given:
        return [names] if names else []
    return [(name,) for name in names]


def _bits(
    options: SearchOptions, names: tuple[str, ...], kv_cache: str, sizes: Sizes | None
) -> list[float]:
    """Numbers of bits to try: as given, else of a grid, and what the budget has room for."""
    if options.mixtures.search_bits:
        return sorted({*options.mixtures.search_bits})
    least, _ = SensitivityOptions(auto_quantize_formats=names).smallest
    within, most = _PLAIN, options.most_bytes
    if sizes is not None and most is not None:
        room = sizes.bits_within(most - sizes.cache_bytes(options.cache_tokens, kv_cache))
        within = _PLAIN if room is None else math.floor(100 * (room - _SCALES)) / 100
    found = {each for each in _GRID if least < each < min(within, _PLAIN)}
    return sorted(found | ({within} if least < within < _PLAIN else set()))


def _refusal(options: SearchOptions, trial: Trial, source: Source) -> str:
    """Why a trial cannot be; empty if it can."""
    rows = [formats.FORMATS[name] for name in trial.formats]
    if reason := next(filter(None, (_why_not(options, row) for row in rows)), ""):
        return reason
    try:
        quantization_options.check(trial.options(options), trial.choice, source.described)
    except UsageError as error:
        return error.cause
    return ""


def _why_not(options: SearchOptions, row: Format) -> str:
    """Why the engine does not read a format, or its GPUs do not run it; empty if they do."""
    if row.broken:
        return row.broken
    found = exportable.verdict(row, target=options.target)
    if not found.exportable:
        return found.reason
    engine = engines.TARGETS[options.target]
    support = engine.algorithms[found.quant_algo]
    if options.generation and support.on(options.generation) == "no":
        return f"{engine.name} does not run {found.quant_algo} on {options.generation}"
    return ""


def _require(options: SearchOptions, trials: Sequence[Trial], refused: Mapping[str, str]) -> None:
    """Raise UsageError if nothing can be tried, or not a format that is named."""
    tried = {name for trial in trials for name in trial.formats if trial.bits is None}
    for row in options.named_formats:
        if row.name not in tried:
            kinds = (Trial((row.name,), None, kv).kind for kv in _caches(options))
            reason = next(refused[kind] for kind in kinds if kind in refused)
            raise UsageError(
                f"--search-formats {row.name}", reason, "leave it out, or name another"
            )
    if not trials:
        first = next(iter(refused.items()), ("no format", "none is there"))
        raise UsageError(
            f"--target {options.target}" + (f" --gpu {options.gpu}" if options.gpu else ""),
            f"nothing can be tried on this model; {first[0]}: {first[1]}",
            "name another engine, other GPUs, or formats (--search-formats)",
        )
