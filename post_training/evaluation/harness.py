"""Tasks of lm-evaluation-harness asked of a candidate, and its answers as measures."""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from post_training.common.errors import UsageError
from post_training.distributed.collectives import from_all_ranks
from post_training.evaluation.answers import Answer, Measure
from post_training.evaluation.candidates import Candidate
from post_training.evaluation.harness_options import HarnessOptions

logger = logging.getLogger("post_training")

_LONGEST = 2000  # characters of a question, or of what was answered, that a report repeats


@contextlib.contextmanager
def _hub_package() -> Iterator[None]:
    """Within it ``import evaluate`` is the package of that name, which tasks use, not the stage."""
    here = Path(__file__).resolve().parents[2]
    own, path = sys.modules.pop("evaluate", None), list(sys.path)
    sys.path[:] = [each for each in path if Path(each or ".").resolve() != here]
    try:
        importlib.import_module("evaluate")
    finally:
        sys.path[:] = path
    try:
        yield
    finally:
        package = sys.modules.pop("evaluate")
        if own is not None:
            sys.modules["evaluate"] = own
        del package


def tasks(options: HarnessOptions) -> Any:
    """The harness' manager of tasks; UsageError for a name that it does not know."""
    from lm_eval.tasks import TaskManager

    with _hub_package():
        manager = TaskManager(include_path=options.folder)
    unknown = [name for name in options.names if not manager.match_tasks([name])]
    if unknown:
        raise UsageError(
            f"--tasks {unknown[0]}",
            "lm-evaluation-harness knows no such task, group or tag",
            "`lm_eval ls tasks` lists them; --tasks-path adds a folder of your own",
        )
    return manager


def ask(options: HarnessOptions, manager: Any, candidate: Candidate) -> list[Measure]:
    """Run the tasks; a collective call with the same result on every rank.

    A measure for each metric that is 0 or 1 for a question; ``candidate.notes`` gets all figures.
    """
    from lm_eval.evaluator import simple_evaluate

    from post_training.evaluation.harness_model import MegatronLM

    session = candidate.session
    logger.info("lm-evaluation-harness: %s to the %s", options.tasks, candidate.role)
    with (
        _hub_package(),
        _of_this_rank(),
        tqdm(unit="request", disable=not session.show_progress) as bar,
    ):

        def progress(kind: str, done: int) -> None:
            bar.set_description(kind, refresh=False)
            bar.update(done)

        model = MegatronLM(
            candidate, options.tasks_batch_size, candidate.options.seed, progress=progress
        )
        found = simple_evaluate(
            model=model,
            tasks=options.names,
            num_fewshot=options.tasks_shots,
            limit=options.tasks_limit,
            apply_chat_template=options.tasks_chat,
            task_manager=manager,
            bootstrap_iters=0,
            log_samples=True,
        )
    content: dict[str, Any] = from_all_ranks(_plain(found) if session.is_main else {})[0]
    candidate.notes["tasks"] = content["results"]
    candidate.notes["task_versions"] = content["versions"]
    return [
        measure
        for task in sorted(content["samples"])
        for measure in measures(task, content["samples"][task])
    ]


@contextlib.contextmanager
def _of_this_rank() -> Iterator[None]:
    """Python's and NumPy's random states, which the harness seeds, are as before afterwards."""
    import numpy

    before, of_numpy = random.getstate(), numpy.random.get_state()
    try:
        yield
    finally:
        random.setstate(before)
        numpy.random.set_state(of_numpy)


def _plain(found: Any) -> dict[str, Any]:
    """What is kept of the harness' result, as JSON holds it."""
    kept = {name: found[name] for name in ("results", "versions", "samples")}
    content: dict[str, Any] = json.loads(json.dumps(kept, default=str))
    return content


def measures(task: str, samples: Sequence[Mapping[str, Any]]) -> Iterator[Measure]:
    """A measure for each filter and metric of a task whose values are 0 or 1."""
    by_filter: dict[str, list[Mapping[str, Any]]] = {}
    for sample in sorted(samples, key=lambda each: int(each["doc_id"])):
        by_filter.setdefault(sample["filter"], []).append(sample)
    for name, rows in by_filter.items():
        suffix = "" if name == "none" else f".{name}"
        for metric in rows[0]["metrics"]:
            values = [row.get(metric) for row in rows]
            if all(value in (0, 1) for value in values):
                answers = [
                    _answer(row, right=value == 1) for row, value in zip(rows, values, strict=True)
                ]
                details = {"answers": [each.given for each in answers]}
                yield Measure(f"{task}.{metric}{suffix}", answers, details)


def _answer(row: Mapping[str, Any], right: bool) -> Answer:
    asked = row["arguments"]
    first = next(iter(asked.values())) if isinstance(asked, Mapping) else asked[0]
    prompt = next(iter(first.values())) if isinstance(first, Mapping) else first[0]
    return Answer(
        id=str(row["doc_id"]),
        question=str(row["doc"].get("question") or prompt)[-_LONGEST:],
        expected=str(row["target"])[:_LONGEST],
        given=json.dumps(row["filtered_resps"], ensure_ascii=False)[:_LONGEST],
        right=right,
    )
