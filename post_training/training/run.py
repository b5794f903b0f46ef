"""What every stage that trains does: where the run starts, its data, record, checkpoints, summary.

``check`` of such a stage calls :func:`find_start` and :func:`check_model`; its work opens a
:class:`Run`, builds the model, and calls :meth:`Run.train`. No torch before the work.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from post_training.distributed import signals
from post_training.distributed.session import Session
from post_training.models import parallel_check
from post_training.training import run_folder
from post_training.training.options import EXIT_UNFINISHED, TrainingOptions

if TYPE_CHECKING:
    from megatron.core.transformer import MegatronModule

    from post_training.training.sampler import Samples
    from post_training.training.task import Task
    from post_training.training.trainer import TrainingResult

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


@dataclass(frozen=True)
class TrainingPlan:
    """What every stage that trains has decided; its own plan has more."""

    options: StageOptions
    start: Start
    training: TrainingOptions

    @property
    def source(self) -> Source:
        return self.start.source


def find_start(options: StageOptions, *, after: str | None = None) -> Start:
    """The run in ``--save``, if there is one to resume, else the model that the options name.

    What the stage ``after`` has put there is trained in its place.

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
    source = find_source(options)
    if resumes and after is None and source.described and source.described.value("num_moe_experts"):
        run_folder.require_same_experts(source.manifest or {}, folder, options.parallel.expert)
    return Start(folder, source, in_place, resumes)


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


def require_trainable(source: Source) -> None:
    """Raise UsageError for a model whose weights are packed: they are codes, without gradients."""
    quantization = (source.manifest or {}).get("quantization")
    if isinstance(quantization, Mapping) and quantization.get("compressed"):
        raise UsageError(
            f"--load {source.location}",
            "its weights are packed (--compress), and only weights in 16 or 32 bits are trained",
            "quantize the model again without --compress; export.sh packs the trained one",
        )


def exit_if_asked(session: Session) -> None:
    """Exit with code 75 if a deferred signal has come; a collective call.

    For the moments before training begins at which nothing is half done: there is nothing to save.
    """
    from post_training.distributed.collectives import from_all_ranks

    if not any(from_all_ranks(signals.asked_to_end())):
        return
    if session.is_main:
        print(
            f"{session.stage}: asked to end before its training began; nothing was changed, and "
            "the same command starts it again",
            file=sys.stderr,
        )
    sys.exit(EXIT_UNFINISHED)


@dataclass(frozen=True)
class Run:
    """A training run in its session; ``source`` is local."""

    plan: TrainingPlan
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
        return cls(plan, session, source, small_files)

    def data(
        self, prepare: Callable[..., tuple[dict[str, Any], dict[str, Any]]], text: TextSource
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Parts of packed text, and what is known about them; a collective call.

        ``prepare`` is that of ``conversation_data`` or ``text_data``.
        """
        training = self.plan.training
        parts, content = prepare(
            text,
            loading.tokenizer(self.source, self.plan.options),
            training.seq_length,
            training.train_iters * training.global_batch_size,
            self.plan.start.folder / run_folder.FOLDER / "data",
            self.session.show_progress,
        )
        logger.info("training data: %s", text_data.describe(content))
        return parts, content

    def train(
        self,
        model: MegatronModule,
        task: Task,
        parts: Mapping[str, Samples],
        inputs: Sequence[dict[str, Any]],
        describe: Callable[[int], tuple[Mapping[str, Any], Mapping[str, Any]]],
        evaluate: Callable[[int], Mapping[str, float]] | None = None,
    ) -> TrainingResult:
        """Train to the last iteration, or until a signal or a limit ends the run.

        Args:
            model: this rank's part, whose parameters with ``requires_grad`` are trained.
            task: what it is trained for.
            parts: sequences to train on (``train``), and held-out ones (``valid``).
            inputs: what the run is made from besides the source, for its manifests.
            describe: from the iteration to further metrics and entries of the manifest.
            evaluate: further metrics at each evaluation, from the iteration.
        """
        from post_training.training.checkpoint import TrainingCheckpoints
        from post_training.training.trainer import Trainer

        plan, training, source = self.plan, self.plan.training, self.source
        # Before the first save, which may replace the source.
        if plan.start.resumes:  # the folder itself is then the source
            made_from = run_folder.inputs_of_all((source.manifest or {})["inputs"], inputs)
        else:
            made_from = [*source.inputs(), *inputs]

        def manifest(iteration: int, metrics: Mapping[str, float]) -> Manifest:
            more_metrics, entries = describe(iteration)
            complete = iteration >= training.train_iters
            return record.of_run(
                plan.options,
                self.session,
                source,
                inputs=made_from,
                metrics={**more_metrics, **metrics},
                extra={**source.carried(), **entries, "complete": complete},
            )

        folder, keep = plan.start.folder, training.keep_checkpoints
        checkpoints = TrainingCheckpoints(folder, manifest, self.small_files, keep)
        resume = plan.start.resumes
        trainer = Trainer(model, task, training, self.session, checkpoints, resume, evaluate)
        return trainer.run(parts["train"], parts["valid"])


def show(
    plan: TrainingPlan,
    result: TrainingResult,
    title: str,
    rows: Mapping[str, str],
    next_step: str,
) -> None:
    """Print the summary; title, rows and next step are a finished run's."""
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
