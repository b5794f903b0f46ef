"""The flags that say which tasks of lm-evaluation-harness are run. No torch."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from post_training.common import inputs
from post_training.common.errors import UsageError
from post_training.config.checks import at_least
from post_training.config.flags import flag


@dataclass(frozen=True, kw_only=True)
class HarnessOptions:
    TITLE: ClassVar[str] = "tasks of lm-evaluation-harness (pip install lm_eval==0.4.13)"

    tasks: str | None = flag(
        metavar="NAME,NAME", help="tasks, groups or tags, such as arc_easy,hellaswag"
    )
    tasks_path: str | None = flag(metavar="DIR", help="folder with further tasks as YAML files")
    tasks_shots: int | None = flag(
        metavar="N", check=at_least(0), help="solved examples before each question (the task's)"
    )
    tasks_limit: int | None = flag(
        metavar="N", check=at_least(1), help="the first N questions of each task (all)"
    )
    tasks_batch_size: int = flag(
        8, metavar="N", check=at_least(1), help="sequences at a time (%(default)s)"
    )
    tasks_chat: bool = flag(False, help="ask through the model's chat template")

    @property
    def names(self) -> list[str]:
        return [name.strip() for name in (self.tasks or "").split(",") if name.strip()]

    @property
    def folder(self) -> str | None:
        """Of further tasks, without ``~``; None where no task is asked."""
        return str(inputs.expanded(self.tasks_path)) if self.names and self.tasks_path else None

    def read(self) -> dict[str, str | None]:
        """What a report records, by role: the files that say what is asked."""
        return {"tasks": self.folder}


def check(options: HarnessOptions) -> None:
    """Raise UsageError for tasks without lm-evaluation-harness, or a folder that is not there."""
    if not options.names:
        return
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError(
            f"--tasks {options.tasks}",
            "lm-evaluation-harness, which has the tasks, is not installed",
            "pip install lm_eval==0.4.13",
        )
    if options.folder:
        what = f"--tasks-path {options.tasks_path}"
        remedy = "name a folder with YAML files of tasks"
        inputs.check_folder(Path(options.folder), what, remedy)


def room(positions: int, new: int) -> int:
    """Most tokens of a text that so many new ones are to follow; UsageError if there are none.

    Args:
        positions: of the model.
    """
    if new >= positions:
        raise UsageError(
            "--tasks",
            f"one of them asks for answers of {new:,} tokens, and the model was made for "
            f"{positions:,} with the question",
            "leave it out, or lower its max_gen_toks in a copy of its file (--tasks-path)",
        )
    return positions - new


def require_room(positions: int, scored: int) -> None:
    """Raise UsageError for an answer that has more tokens than the model has positions."""
    if scored > positions:
        cause = f"one of them has an answer of {scored:,} tokens, and the model was made for "
        raise UsageError("--tasks", f"{cause}{positions:,}", "leave it out")
