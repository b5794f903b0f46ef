"""What every stage that trains does: where the run starts, its data, record, checkpoints, summary.

``check`` of such a stage calls :func:`find_start` and :func:`check_model`; its work opens a
:class:`Run`, builds the model, and calls :meth:`Run.train`. No torch before the work.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from post_training.checkpoints import loading, record, torch_dist
from post_training.checkpoints.huggingface import SmallFiles
from post_training.checkpoints.source import Source, fetch_source, find_source
from post_training.common import files, report
from post_training.common.errors import UsageError
from post_training.common.manifest import Manifest
from post_training.config import checks
from post_training.config.options import StageOptions
from post_training.data import text_data
from post_training.data.sources import TextSource
from post_training.models import parallel_check
from post_training.training import run_folder
from post_training.training.checkpoint import TrainingCheckpoints
from post_training.training.options import EXIT_UNFINISHED, TrainingOptions
from post_training.training.sampler import Samples
from post_training.training.setup import exit_if_asked
from post_training.training.task import Task
from post_training.training.trainer import Trainer, TrainingResult

if TYPE_CHECKING:
    from megatron.core.transformer import MegatronModule

    from post_training.distributed.session import Session

logger = logging.getLogger("post_training")


@dataclass(frozen=True)
class Start:
    """Where a run starts.

    Attributes:
        folder: of the run (``--save``).
        source: the run in ``folder``, where there is one to resume, else the given model.
        in_place: whether ``source`` is in ``folder``: a run, or a checkpoint that is trained there.
        resumes: whether it resumes a run.
    """

    folder: Path
    source: Source
    in_place: bool
    resumes: bool


class TrainingPlan(Protocol):
    """What the plan of a stage that trains has."""

    @property
    def options(self) -> StageOptions: ...

    @property
    def start(self) -> Start: ...

    @property
    def training(self) -> TrainingOptions: ...


def find_start(options: StageOptions, *, after: str | None = None) -> Start:
    """The run in ``--save``, if there is one to resume, else the model that the options name.

    Args:
        options: the stage's.
        after: a stage whose output in ``--save`` is trained in its place.

    Raises:
        UsageError: if ``--save`` is not given or occupied, or the model is not there.
    """
    folder = Path(checks.required("--save", options.save, "MLM_MODEL_SAVE"))
    resumes = run_folder.resumes(folder, options.overwrite)
    overwrite = options.overwrite and not resumes
    model = options.given.get("load")
    run_folder.check_folder(folder, options.stage, overwrite, after, model)
    in_place = not overwrite and (folder / torch_dist.TRACKER).is_file()
    if in_place:
        options = replace(options, load=str(folder))
    return Start(folder, find_source(options), in_place, resumes)


def check_model(source: Source, options: StageOptions, seq_length: int) -> None:
    """Raise UsageError unless the ranks divide the model and it reads sequences of this length."""
    checks.no_context_parallelism(options.parallel.context)
    if source.described is None:
        return
    parallel_check.check(source.described, options.parallel)
    limit = source.described.max_position_embeddings
    if seq_length > limit:
        raise UsageError(
            f"--seq-length {seq_length}",
            f"the texts of {source.location} have at most {limit} tokens",
            f"--seq-length {limit}",
        )


@dataclass(frozen=True)
class Run:
    """A training run in its session; ``source`` is local."""

    options: StageOptions
    training: TrainingOptions
    start: Start
    session: Session
    source: Source
    small_files: SmallFiles

    @classmethod
    def open(cls, plan: TrainingPlan, session: Session) -> Run:
        """The run of a plan, a hub name downloaded; exits if the process was asked to end."""
        from post_training.distributed import collectives

        exit_if_asked(session)
        source = fetch_source(plan.start.source, plan.options)
        if plan.options.overwrite and not plan.start.resumes:
            # Deleted when the first iteration of this run is saved.
            collectives.on_first_rank(lambda: files.set_aside(plan.start.folder))
        folder = loading.local_huggingface(source, plan.options)
        small_files = SmallFiles(folder, plan.options.trust_remote_code)
        return cls(plan.options, plan.training, plan.start, session, source, small_files)

    def data(
        self, prepare: Callable[..., tuple[dict[str, Any], dict[str, Any]]], text: TextSource
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Parts of packed text, and what is known about them; a collective call.

        Args:
            prepare: ``conversation_data.prepare`` or ``text_data.prepare``.
            text: what to train on.
        """
        parts, content = prepare(
            text,
            loading.tokenizer(self.source, self.options),
            self.training.seq_length,
            self.training.train_iters * self.training.global_batch_size,
            self.start.folder / run_folder.FOLDER / "data",
            self.session.show_progress,
        )
        logger.info("training data: %s", text_data.describe(content))
        return parts, content

    def inputs(self, *more: dict[str, Any]) -> list[dict[str, Any]]:
        """What the run is made from, for its manifests: the source and ``more``.

        To be called before the first save, which may replace the source.
        """
        if self.start.resumes:
            # The folder itself is where the run resumes, not what it was made from.
            return list((self.source.manifest or {})["inputs"])
        return [*self.source.inputs(), *more]

    def train(
        self,
        model: MegatronModule,
        task: Task,
        train: Samples,
        valid: Samples,
        record: Record,
        evaluate: Callable[[int], Mapping[str, float]] | None = None,
    ) -> TrainingResult:
        """Train to the last iteration, or until a signal or a limit ends the run.

        Args:
            model: this rank's part, whose parameters with ``requires_grad`` are trained.
            task: what it is trained for.
            train: sequences to train on.
            valid: held-out ones.
            record: the manifests.
            evaluate: further metrics at each evaluation, from the iteration.
        """
        keep = self.training.keep_checkpoints
        checkpoints = TrainingCheckpoints(self.start.folder, record, self.small_files, keep)
        trainer = Trainer(
            model,
            task,
            self.training,
            self.session,
            checkpoints,
            resume=self.start.resumes,
            evaluate=evaluate,
        )
        return trainer.run(train, valid)


@dataclass(frozen=True)
class Record:
    """What a run records of itself in ``run.json``; called with an iteration and its metrics.

    Attributes:
        run: the run.
        inputs: what it was made from, see :meth:`Run.inputs`.
        describe: from the iteration to further metrics and further entries.
    """

    run: Run
    inputs: list[dict[str, Any]]
    describe: Callable[[int], tuple[Mapping[str, Any], Mapping[str, Any]]]

    def __call__(self, iteration: int, metrics: Mapping[str, float]) -> Manifest:
        run = self.run
        more_metrics, entries = self.describe(iteration)
        complete = iteration >= run.training.train_iters
        return record.of_run(
            run.options,
            run.session,
            run.source,
            inputs=self.inputs,
            metrics={**more_metrics, **metrics},
            extra={**run.source.carried(), **entries, "complete": complete},
        )


def show(
    plan: TrainingPlan,
    result: TrainingResult,
    title: str,
    rows: Mapping[str, str],
    next_step: str,
) -> None:
    """Print the summary.

    Args:
        title: of a finished run.
        rows: its figures.
        next_step: what to do with a finished run.
    """
    folder = plan.start.folder
    report.summary(
        title if result.finished else "interrupted, and saved",
        {
            "iterations": f"{result.iteration:,} of {plan.training.train_iters:,}",
            **rows,
            "checkpoint": f"{folder} ({report.size(folder)})",
            "metrics": f"{folder}/{run_folder.FOLDER}/{{metrics.jsonl,curves.png,tensorboard/}}",
            **(report.cost(result.manifest) if result.manifest else {}),
        },
        next_step=next_step if result.finished else "the same command resumes the run",
    )


def exit_code(_plan: Any, result: TrainingResult | None) -> int:
    """75 for a run that was interrupted."""
    return 0 if result is None or result.finished else EXIT_UNFINISHED
