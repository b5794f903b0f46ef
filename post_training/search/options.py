"""The flags of a search: budget, engine, what is tried. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from post_training.common.errors import UsageError
from post_training.config import checks, quantities
from post_training.config.flags import flag, group
from post_training.config.options import StageOptions
from post_training.data.options import CalibrationOptions
from post_training.evaluation.text_options import TextOptions
from post_training.quantization import layer_names
from post_training.quantization.engines import registry as engines
from post_training.quantization.engines.base import GENERATIONS
from post_training.quantization.expert_options import ExpertOptions
from post_training.quantization.formats import registry as formats
from post_training.quantization.formats.base import Format
from post_training.quantization.search_options import SensitivityOptions

GPUS = {name.lower(): name for name in GENERATIONS}


def _each_positive(option: str, values: tuple[float, ...]) -> None:
    for value in values:
        checks.positive(option, value)


@dataclass(frozen=True, kw_only=True)
class MixtureOptions(SensitivityOptions):
    search_bits: tuple[float, ...] = flag(
        (),
        metavar="X",
        check=_each_positive,
        help="stored bits per weight of the linear layers to try, scales included (chosen by the "
        "formats' and the budget)",
    )
    no_mixtures: bool = flag(False, help="try single formats only")
    search_rounds: int = flag(
        3,
        metavar="N",
        check=checks.at_least(0),
        help="further numbers of bits, each halfway between one that meets --max-kl and one that "
        "does not (%(default)s)",
    )


@dataclass(frozen=True, kw_only=True)
class SearchOptions(StageOptions):
    search_dir: str | None = flag(
        metavar="DIR", help="folder for trials, search.json and the report; a search resumes there"
    )
    max_size: str | None = flag(
        metavar="BYTES",
        help="most bytes of the exported weights: 6e9, 6GB, 6GiB; the best quality within it is "
        "recommended",
    )
    max_kl: float | None = flag(
        metavar="X",
        check=checks.positive,
        help="largest mean KL divergence from the model before, in nats; without --max-size the "
        "smallest size within it is recommended",
    )
    cache_tokens: int = flag(
        0,
        metavar="N",
        check=checks.at_least(0),
        help="tokens whose keys and values count as size too; formats of them are tried then "
        "(%(default)s)",
    )
    target: str = flag(
        engines.DEFAULT,
        choices=tuple(engines.TARGETS),
        help="engine that is to serve the model (%(default)s)",
    )
    gpu: str | None = flag(
        choices=tuple(GPUS), help="generation of the GPUs that it is to run on (any)"
    )
    search_formats: tuple[str, ...] = flag(
        (),
        metavar="NAME",
        help="formats to try, as words or separated by commas (all that the engine and the GPUs "
        "run)",
    )
    search_kv_caches: tuple[str, ...] = flag(
        (),
        metavar="NAME",
        choices=tuple(formats.KV_CACHES),
        help="formats of keys and values to try (none; with --cache-tokens all that the engine "
        "reads)",
    )
    also: tuple[str, ...] = flag(
        (),
        metavar="DIR",
        help="further models to try the formats on, such as pruned and distilled ones",
    )
    leave_out: tuple[str, ...] = flag(
        (),
        metavar="PATTERN",
        action="extend",
        help="leave linear layers in 16 bits by name, such as decoder.layers.0.* or *down_proj",
    )
    conf: str = flag("auto", metavar="NAME", help="what the recommended command calls the model")
    text: TextOptions = group(TextOptions)
    mixtures: MixtureOptions = group(MixtureOptions)
    calibration: CalibrationOptions = group(CalibrationOptions)
    experts: ExpertOptions = group(ExpertOptions)

    @property
    def most_bytes(self) -> float | None:
        """``--max-size``; UsageError if it is no number of bytes."""
        text = self.max_size
        return None if text is None else quantities.read("--max-size", text, quantities.BYTES)

    @property
    def generation(self) -> str:
        """Of the GPUs, as the engines' tables spell it; empty for any."""
        return GPUS[self.gpu] if self.gpu else ""

    @property
    def left_out(self) -> tuple[str, ...]:
        """Patterns of ``--leave-out``, with Megatron's names."""
        return tuple(dict.fromkeys(map(layer_names.translated, self.leave_out)))

    @property
    def named_formats(self) -> list[Format]:
        """Those of ``--search-formats``; UsageError for an unknown name."""
        words = [each for word in self.search_formats for each in word.split(",") if each]
        found = [formats.find(name, "--search-formats") for name in words]
        for row in found:
            if row.linear is None:
                raise UsageError(
                    f"--search-formats {row.name}",
                    "it quantizes keys and values alone",
                    f"--search-kv-caches {row.kv}",
                )
        return found


def check(options: SearchOptions) -> None:
    """Raise UsageError for a search without a budget or a text, or budgets that are none."""
    if options.most_bytes is None and options.max_kl is None:
        raise UsageError(
            "the budget (not given)",
            "a search ends in the best model within one",
            "--max-size 6GB for the best quality of that size, or --max-kl 0.02 for the smallest "
            "model of that quality",
        )
    if options.text.text is None:
        raise UsageError(
            "--text (not given)",
            "the KL divergence is measured on it",
            "name text that the model is not calibrated on: a file, a folder or a hub name",
        )
