"""Quantize and export a model that is larger than the machine: one layer at a time.

The model is built without weights. For each layer its tensors are read, the hidden states of all
calibration sequences pass through it, its scales are found, its part of the export is written, read
back and compared, and its memory is given back; then comes the next. The GPU holds one layer and
the activations of a batch, the host a file of the export. The folder is the one that the whole
model's export writes, tensor by tensor, in files of a layer each.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import xxhash
from tqdm import tqdm

from post_training.checkpoints import loading, part_weights
from post_training.checkpoints.part_weights import PartWeights
from post_training.checkpoints.source import Source
from post_training.common import manifest, redaction
from post_training.common.errors import UsageError
from post_training.distributed.collectives import from_all_ranks, on_first_rank
from post_training.distributed.session import Session
from post_training.export import readback
from post_training.export.exporting import ExportPlan
from post_training.export.folder import join, require_equal
from post_training.export.layer_progress import LayerProgress
from post_training.export.model_folder import Writer, not_compared
from post_training.export.part_files import PartFiles, Written, differently_read
from post_training.models import builder, parts
from post_training.models.parts import Part
from post_training.quantization import coverage, ptq, quantizers, ranges
from post_training.quantization.configuration import method_of
from post_training.quantization.layer_calibration import LayerCalibration
from post_training.quantization.options import Choice, QuantizeOptions
from post_training.quantization.ptq import PtqResult

logger = logging.getLogger("post_training")

# Flags that change nothing in what is written.
_WITHOUT_EFFECT = ("overwrite", "log_level", "disable_tqdm", "no_verify", "export_dir")


@dataclass
class _Run:
    """The model and what is known of it, while its parts come and go."""

    model: Any
    config: Any
    data: LayerCalibration
    weights: PartWeights
    part_files: PartFiles
    parts: list[Part]
    written: list[Written] = field(default_factory=list)
    ranges: dict[str, dict[str, float]] = field(default_factory=dict)

    def more(self) -> dict[str, Any]:
        """Beside what is written, for the record."""
        return {
            "calibration": self.data.progress(),
            "ranges": self.ranges,
            "weights": self.weights.known(),
        }

    def go_on(self, more: Mapping[str, Any]) -> None:
        self.data.go_on(more["calibration"])
        self.ranges.update(more["ranges"])
        self.weights.go_on(more["weights"])


class Plan(Protocol):
    """Of the stage."""

    @property
    def options(self) -> QuantizeOptions: ...
    @property
    def export(self) -> ExportPlan | None: ...
    @property
    def choice(self) -> Choice: ...


def quantize(
    plan: Plan, source: Source, data: LayerCalibration, session: Session
) -> tuple[PtqResult, dict[str, Any]]:
    """Write the quantized model into the working folder of the export; a collective call.

    Returns:
        What quantization did, and the export's metrics.

    Raises:
        UsageError: as ``ptq.quantize`` and ``exporting.write``.
    """
    options, export, choice = plan.options, plan.export, plan.choice
    if export is None or isinstance(choice, str):
        raise ValueError("layerwise_checks refuses it")
    build = loading.build_options(source, options)
    model = builder.build(source.architecture, build, weights=False)
    config = ptq.prepare(model, options, choice, data)
    data.single = not ptq.needs_data(model, method_of(config))
    writer = Writer(model, source, options, session, export.target, export.allow_unexportable)
    progress = LayerProgress(export.folder, _key(source, options, data))
    weights = part_weights.opened(model, source, options)
    part_files = PartFiles(writer, progress.work, session.device, export.shard_bytes)
    every = parts.of(model)
    run = _Run(model, config, data, weights, part_files, every)
    _require_plain_ends(model)
    with loading.verified(Path(source.location), options):
        _go_through(run, progress, session)
    if len(run.written) == len(run.parts):
        run.written.append(part_files.write_carried(len(run.parts)))
    on_first_rank(source.require_unchanged)
    weights.finish(model)
    reached = coverage.survey(model, config, options.asked_to_leave_out)
    found = quantizers.judge_model(
        model, required=not options.allow_unexportable, target=options.target
    )
    result = PtqResult(config, reached, found, run.ranges)
    progress.finish(run.written, run.more())
    metrics = _complete(run, writer, progress.work, session)
    on_first_rank(progress.remove)
    return result, metrics


def _go_through(run: _Run, progress: LayerProgress, session: Session) -> None:
    """Do each part's work, from where an earlier run got to."""
    data, every = run.data, run.parts
    if found := progress.find():
        run.written, data.states = found.parts, list(found.states)
        run.go_on(found.more)
        data.place()
        logger.info("going on after %d of %d parts", len(run.written), len(every))
    start = len(run.written)
    if start >= len(every):
        return
    embedding, *_ = every
    run.weights.read(0, embedding)
    data.learn_arguments(run.model)
    if start == 0:
        data.embed(run.model)
    bar = tqdm(
        every, initial=start, desc="layer by layer", unit="part", disable=not session.show_progress
    )
    bar.reset(len(every))
    for number, part in enumerate(every):
        if number >= start:
            if number:
                run.weights.read(number, part)
            if part.layer is not None:
                _calibrate(run, part)
            _merge(run.ranges, ranges.of_model(part.model))
            run.written.append(run.part_files.write(number, part))
            progress.offer(run.written, data.states, run.more())
        parts.release(part.model)
        bar.update()
    bar.close()


def _require_plain_ends(model: Any) -> None:
    """Raise UsageError for quantizers outside of the decoder's layers, which get no data."""
    for name, _ in quantizers.enabled(model):
        if not name.startswith("decoder.layers."):
            raise UsageError(
                f"--layerwise with a recipe that quantizes {name.rpartition('.')[0]}",
                "only decoder layers are calibrated one by one",
                "leave it out in the recipe, or leave --layerwise out",
            )


def _calibrate(run: _Run, part: Part) -> None:
    number = part.layer.layer_number - 1
    run.data.at(number, part.layer)
    ptq.with_scales(part.model, run.config, run.data)
    run.data.done()


def _merge(found: dict[str, dict[str, float]], more: Mapping[str, Mapping[str, float]]) -> None:
    for name, kinds in more.items():
        found.setdefault(name, {}).update(kinds)


def _complete(run: _Run, writer: Writer, work: Path, session: Session) -> dict[str, Any]:
    """Give the files their names, write what is no tensor and look at the whole folder."""
    run.part_files.describe_all(run.written)
    mine = [name for part in run.written for name in part.files]
    names = [name for each in from_all_ranks(mine) for name in each]
    on_first_rank(lambda: join(work, names))
    writer.write_small_files(work)
    written = readback.Folder(work, session.device, carried=writer.carried.names)
    problems = writer.problems(written)
    compared = {name for part in run.written for name in part.compared} | writer.carried.names
    if session.is_main:
        problems += not_compared(written, compared) + differently_read(written, run.written)
    require_equal(problems, work)
    return writer.metrics(written, len(compared))


def _key(source: Source, options: QuantizeOptions, data: LayerCalibration) -> dict[str, Any]:
    """What decides the result."""
    given = {n: v for n, v in options.given.items() if n not in _WITHOUT_EFFECT}
    return {
        "flags": redaction.hide_in(given),
        "model": source.entry,
        "data": xxhash.xxh3_128_hexdigest(data.data.input_ids.numpy().tobytes()),
        "versions": manifest.versions(),
        "git_commit": manifest.git_commit(),
        "ranks": torch.distributed.get_world_size(),
    }
