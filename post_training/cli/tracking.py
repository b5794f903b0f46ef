"""MLflow: the parameters, metrics and manifests of a stage's run, where ``--mlflow`` asks for it.

What fails before the work is an error. What fails afterwards is a warning: the output is there.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from post_training.common import manifest, redaction
from post_training.common.errors import UsageError, first_line
from post_training.config.options import StageOptions
from post_training.training import metrics

logger = logging.getLogger("post_training")

_VARIABLE = "MLFLOW_TRACKING_URI"
_EXPERIMENT = "post_training"  # unless MLFLOW_EXPERIMENT_NAME names another
_INTERRUPTED = 75  # exit code of training that saved and is to be resumed
_LONGEST = 500  # characters of a parameter
_BATCH = 100  # of parameters and metrics of a request
_MOST = 1000  # metrics of a manifest
# Of a manifest or report: not figures of what was made.
_NOT_FIGURES = frozenset(
    "architecture configuration versions inputs outputs ranges layers trial trials".split()
)
# Of a run that trains, beside its manifest.
_BESIDE = ("training/curves.png", "training/metrics.jsonl")
# A server that is away is found in seconds, and not in minutes.
_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}


@dataclass
class Tracked:
    """What a run leaves: ``places`` are outputs and reports, of which some may not be there."""

    places: list[Path] = field(default_factory=list)


def check(options: StageOptions) -> None:
    """Raise UsageError where ``--mlflow`` names no place, or the package is missing."""
    if options.mlflow is None:
        return
    if not _place(options):
        raise UsageError(
            "--mlflow (without a place)",
            f"{_VARIABLE} is not set either",
            "--mlflow http://server:5000, or a folder",
        )
    if importlib.util.find_spec("mlflow") is None:
        raise UsageError(
            f"--mlflow {redaction.hide(options.mlflow)}",
            "the package mlflow is not installed",
            "python -m pip install mlflow-skinny, or leave the flag out",
        )


@contextlib.contextmanager
def run(options: StageOptions, *, is_main: bool) -> Iterator[Tracked]:
    """The block as a run of MLflow, if one is asked for; its first process logs it.

    Raises:
        UsageError: before the block, if nothing can be logged there.
    """
    tracked = Tracked()
    started = _Run.begin(options) if is_main and options.mlflow is not None else None
    status = "FAILED"
    try:
        yield tracked
        status = "FINISHED"
    except SystemExit as stop:
        status = "KILLED" if stop.code == _INTERRUPTED else "FAILED"
        raise
    finally:
        if started is not None:
            started.end(status, tracked.places)


def _place(options: StageOptions) -> str:
    """The URI that is asked for; a path becomes one."""
    given = options.mlflow or os.environ.get(_VARIABLE, "")
    if not given or re.match(r"[\w+-]+:", given):
        return given
    return Path(given).absolute().as_uri()


@dataclass(frozen=True)
class _Run:
    client: Any
    name: str
    shown: str  # its URI, secrets hidden

    @classmethod
    def begin(cls, options: StageOptions) -> _Run:
        """A new run with the parameters; UsageError if it cannot be made."""
        place = _place(options)
        for name, value in _PATIENCE.items():
            os.environ.setdefault(name, value)
        if place.startswith("file:"):
            # MLflow 3 wants to be told that a folder is meant.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        shown = redaction.hide(place)
        try:
            from mlflow import MlflowClient

            client = MlflowClient(tracking_uri=place)
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or _EXPERIMENT
            found = client.get_experiment_by_name(name)
            experiment = found.experiment_id if found else client.create_experiment(name)
            tags = {"mlflow.runName": options.stage, "command": redaction.command()}
            if commit := manifest.git_commit():
                tags["mlflow.source.git.commit"] = commit
            made = client.create_run(experiment, tags=tags)
            this = cls(client, made.info.run_id, shown)
            this._parameters({"stage": options.stage, **options.given})
        except Exception as error:  # of the package, of HTTP, of a file system
            raise UsageError(
                f"--mlflow {shown}",
                f"MLflow cannot log there: {redaction.hide(first_line(error))}",
                "start the server or correct the address, or leave the flag out",
            ) from error
        logger.info("MLflow: run %s at %s", this.name, shown)
        return this

    def end(self, status: str, places: list[Path]) -> None:
        """Log what was left and end the run; a warning if that fails."""
        try:
            # A run that failed has left what was there before.
            for place in places if status != "FAILED" else []:
                self._output(place)
            self.client.set_terminated(self.name, status)
        except Exception as error:
            logger.warning(
                "MLflow at %s did not take the results of run %s, which are not touched: %s",
                *(self.shown, self.name, redaction.hide(first_line(error))),
            )

    def _parameters(self, given: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        hidden = redaction.hide_in(dict(given))
        found = [Param(_named(name), str(value)[:_LONGEST]) for name, value in hidden.items()]
        for start in range(0, len(found), _BATCH):
            self.client.log_batch(self.name, params=found[start : start + _BATCH])

    def _output(self, place: Path) -> None:
        content = manifest.read(place) if place.exists() else None
        if content is None:
            return
        named = dict(list(figures(content.get("metrics", content)))[:_MOST])
        rows = [(name, value, 0) for name, value in named.items()]
        folder = place if place.is_dir() else place.parent
        for line in metrics.read(folder / "training") if place.is_dir() else []:
            of_line = figures({k: v for k, v in line.items() if k != "iteration"})
            rows += [(f"{line['kind']}/{name}", v, line["iteration"]) for name, v in of_line]
        self._metrics(rows)
        files = [place / manifest.FILE if place.is_dir() else place]
        files += [folder / name for name in _BESIDE if place.is_dir()]
        files += [folder / "report.html"] if place.name == "search.json" else []
        for path in filter(Path.is_file, files):
            self.client.log_artifact(self.name, str(path), place.name)

    def _metrics(self, rows: list[tuple[str, float, int]]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        found = [Metric(_named(name), value, now, step) for name, value, step in rows]
        for start in range(0, len(found), _BATCH):
            self.client.log_batch(self.name, metrics=found[start : start + _BATCH])


def figures(content: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    """The finite numbers of a manifest or report, by their path in it; lists have none."""
    if isinstance(content, Mapping):
        for name, value in content.items():
            if name not in _NOT_FIGURES:
                yield from figures(value, f"{prefix}/{name}" if prefix else str(name))
    elif prefix and isinstance(content, int | float) and not isinstance(content, bool):
        yield from [(prefix, float(content))] if math.isfinite(content) else []


def _named(name: str) -> str:
    """As MLflow takes it."""
    return re.sub(r"[^\w\-. /]", "_", name).strip("/")[:250]
