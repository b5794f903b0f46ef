"""Trials, one after the other in one process: the model is read once and copied for each.

Every step is the stage's own: ``quantize`` quantizes the copy, ``evaluate`` compares it with the
model before, ``export`` packs its weights, which are counted and dropped.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer import MegatronModule

from post_training.checkpoints import loading, record
from post_training.checkpoints.source import Source, fetch_source
from post_training.common import files, kept_warnings
from post_training.common.errors import UsageError
from post_training.common.report import number_of_bytes
from post_training.data import options as calibration_options
from post_training.data.calibration_data import CalibrationData
from post_training.distributed.collectives import on_first_rank
from post_training.distributed.session import Session
from post_training.evaluation import judging
from post_training.evaluation.candidates import Candidate
from post_training.export.exported_weights import open_export
from post_training.export.stored_size import stored_bytes
from post_training.inference.batching import Batching
from post_training.models import builder
from post_training.quantization import ptq
from post_training.quantization.calibration import Calibration
from post_training.search import results
from post_training.search.options import SearchOptions
from post_training.search.results import Result
from post_training.search.sizes import Sizes
from post_training.search.trials import Trial

logger = logging.getLogger("post_training")


@dataclass
class Runner:
    """Measures trials; every method is a collective call.

    Attributes:
        folder: of the search.
        models: what is quantized, by the names of trials' models: options that name it, source.
    """

    options: SearchOptions
    session: Session
    folder: Path
    models: dict[str, tuple[SearchOptions, Source]]

    def __post_init__(self) -> None:
        self.models = {
            name: (its, fetch_source(source, its)) for name, (its, source) in self.models.items()
        }
        own, source = self.models[""]
        self.reference = Candidate("reference", source, own, self.session, open_export)

    @property
    def source(self) -> Source:
        return self.models[""][1]

    @cached_property
    def samples(self) -> CalibrationData:
        """Sequences to calibrate on; a model with fewer positions would have shorter ones."""
        return calibration_options.load(
            self.options.calibration,
            self.reference.tokenizer,
            self.source.architecture,
            self.options.seed,
        )

    @property
    def counts_exactly(self) -> bool:
        """Whether ranks have whole tensors, which can be packed."""
        sizes = self.options.parallel
        return max(sizes.tensor, sizes.expert, sizes.expert_tensor) == 1

    @cached_property
    def plain_bytes(self) -> int:
        """Of the weights of the model before, as an export has them."""
        if self.counts_exactly:
            model, target = self.reference.model, self.options.target
            return stored_bytes(
                model, self.source, self.reference.options, self.session, target=target
            )
        width = 4 if self.options.precision == "fp32" else 2
        return width * builder.count_parameters(self.reference.model)

    def results(self, trials: list[Trial]) -> Iterator[Result]:
        """Of each trial: as recorded where that is valid, else measured and recorded."""
        for number, trial in enumerate(trials, 1):
            _, source = self.models[trial.model]
            place = results.folder_of(self.folder, trial)
            wanted = results.key(self.options, trial, self.source)
            found = on_first_rank(partial(results.read, place, wanted, trial, source))
            said = "as measured before" if found else "is measured"
            logger.info("trial %d of %d, %s, %s", number, len(trials), trial.name, said)
            result = self._counting_cache(found or self._tried(trial, place, wanted))
            if not result.error:
                size = number_of_bytes(result.size)
                logger.info("%s: %s, KL divergence %.6f", trial.name, size, result.kl)
            yield result

    def _tried(self, trial: Trial, place: Path, wanted: dict[str, Any]) -> Result:
        """Measure and record; what cannot be done is a result too where all ranks see it."""
        sizes = self.options.parallel
        try:
            return self._measure(trial, place, wanted)
        except UsageError as error:
            # Ranks of other stages or replicas may not have failed, and would wait for this one.
            if sizes.pipeline > 1 or sizes.data > 1:
                raise
            logger.warning("trial %s failed: %s: %s", trial.name, error.what, error.cause)
            return Result(trial, error=f"{error.what}: {error.cause}")
        finally:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _measure(self, trial: Trial, place: Path, wanted: dict[str, Any]) -> Result:
        started, warned = time.time(), len(kept_warnings.messages())
        named, source = self.models[trial.model]
        checkpoint = self._sensitivities(trial, source)
        options = trial.options(named, checkpoint.in_use if checkpoint else None)
        model = self._fresh(trial)
        batching = Batching(options.calibration.calib_batch_size, "--calib-batch-size")
        data = Calibration(self.samples, batching, self.session.show_progress)
        result = ptq.quantize(model, options, trial.choice, data)
        if checkpoint is not None:
            on_first_rank(checkpoint.keep)
        candidate = Candidate("model", source, named, self.session, open_export, _model=model)
        text, read = judging.judge_text(self.options.text, [candidate, self.reference])
        parameters = result.reached.to_json()["parameters"]
        if self.counts_exactly:
            size = stored_bytes(model, source, options, self.session, target=options.target)
        else:
            plain = 32 if options.precision == "fp32" else 16
            size = round(result.reached.bits_per_weight(plain)[1] / 8 * parameters)
        found = Result(
            trial,
            bytes=size,
            plain_bytes=self.plain_bytes,
            exact=self.counts_exactly,
            bits_per_weight=round(8 * size / parameters, 4),
            text=text,
            layers=(result.search or {}).get("layers"),
        )
        inputs = [*source.inputs(), *self.source.inputs("reference"), *self.samples.read, *read]
        manifest = record.of_run(
            self.options,
            self.session,
            source,
            inputs=inputs,
            metrics=found.measured(),
            extra={"trial": wanted, "warnings": kept_warnings.messages()[warned:]},
        )
        manifest.started = started

        def save() -> None:
            place.parent.mkdir(parents=True, exist_ok=True)
            manifest.write(files.begin(place))
            files.publish(place)

        on_first_rank(save)
        return found

    def _fresh(self, trial: Trial) -> MegatronModule:
        """A model to quantize: a copy of the one in memory, or one of ``--also``."""
        named, source = self.models[trial.model]
        if trial.model:
            return loading.load(source, named, self.session)
        copied = builder.build(source.architecture, loading.build_options(source, named))
        read = self.reference.model
        for kind in ("named_parameters", "named_buffers"):
            pairs = zip(getattr(copied, kind)(), getattr(read, kind)(), strict=True)
            for (name, mine), (other, theirs) in pairs:
                if name != other:
                    raise ValueError(f"{name} of a new model is {other} of the one that was read")
                mine.data = theirs.data.clone()
        return copied

    def _sensitivities(self, trial: Trial, source: Source) -> Sensitivities | None:
        """Where those of a mixture are kept for its other numbers of bits; None for a format."""
        if trial.bits is None:
            return None
        decided = results.key(self.options, replace(trial, bits=0.0, kv_cache=""), self.source)
        content = json.dumps([decided, source.entry, self.samples.read], sort_keys=True)
        name = hashlib.sha256(content.encode()).hexdigest()[:16]
        place = self.folder / results.SENSITIVITIES / f"{name}.pth"
        found = Sensitivities(place)
        on_first_rank(found.prepare)
        return found

    def _counting_cache(self, found: Result) -> Result:
        tokens = self.options.cache_tokens
        if not tokens:
            return found
        _, source = self.models[found.trial.model]
        sizes = Sizes.of(source.architecture, self.options.precision, ())
        return replace(found, cache_bytes=sizes.cache_bytes(tokens, found.trial.kv_cache))


@dataclass(frozen=True)
class Sensitivities:
    """ModelOpt's file of a mixture's sensitivities, a rank each, complete under its name.

    Attributes:
        place: of the files, to whose name ModelOpt adds the rank.
    """

    place: Path

    @property
    def _new(self) -> Path:
        return self.place.with_name(f"new-{self.place.name}")

    @property
    def in_use(self) -> Path:
        """What ModelOpt reads if it is there, and else writes."""
        return self.place if self._files(self.place) else self._new

    def prepare(self) -> None:
        """Remove what a killed run may have written in part."""
        self.place.parent.mkdir(parents=True, exist_ok=True)
        for each in self._files(self._new):
            each.unlink()

    def keep(self) -> None:
        """What was written is complete."""
        for each in self._files(self._new):
            each.rename(each.with_name(each.name.removeprefix("new-")))

    def _files(self, place: Path) -> list[Path]:
        return sorted(place.parent.glob(f"{place.stem}*"))
