"""How a stage runs: parse, check, dry run, session, work, summary. No torch before the session.

``check`` turns options into a plan: everything that was looked up, read and decided. ``work`` gets
that plan and the session and looks nothing up again. ``docs/extending.md`` adds a stage.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from post_training.checkpoints import record
from post_training.checkpoints.source import Source, fetch_configuration
from post_training.cli import dry_run
from post_training.common import locks, outputs, redaction, streams
from post_training.common.errors import UsageError, exit_with_usage_error, first_line
from post_training.config import arguments, model_description, server_options
from post_training.config.flags import spelled
from post_training.config.options import StageOptions
from post_training.config.server_options import ServedOptions
from post_training.distributed import client_session, session, signals
from post_training.distributed.session import Session

logger = logging.getLogger("post_training")


class Plan(Protocol):
    """What every plan has: the options it was made from, and the model to work on.

    There is no model where a server is asked.
    """

    @property
    def options(self) -> StageOptions: ...
    @property
    def source(self) -> Source | None: ...


@dataclass(frozen=True)
class Stage[Options: StageOptions, P: Plan, Result]:
    """A stage of the toolkit.

    Attributes:
        name: its ``.py`` and ``.sh``, e.g. ``convert``.
        options: class of its options; the fields are its flags.
        check: from options to a plan; raises UsageError for what cannot work. Must not import
            torch, load weights or use the network. It runs again when the configuration of a hub
            name has been downloaded.
        work: does it, on every rank.
        show: prints the summary, on rank 0, from the plan, what ``work`` returned and the session.
        exit_code: from the plan and the result, the same on every rank.
        outputs: names of the options whose paths it writes: one run at a time writes each, and
            none may be an input, or the folder of one.
        saves_on_signal: SIGTERM and SIGUSR1 end the work at a point where it can save.
        sequence_parallel: ``--sequence-parallel`` has an effect.
        served: the same stage where ``--server`` names a server that has the model.
    """

    name: str
    options: type[Options]
    check: Callable[[Options], P]
    work: Callable[[P, Session], Result]
    show: Callable[[P, Result, Session], None] | None = None
    exit_code: Callable[[P, Result], int] = lambda plan, result: 0
    outputs: tuple[str, ...] = ()
    saves_on_signal: bool = False
    sequence_parallel: bool = False
    served: Stage[Any, Any, Any] | None = None

    def asked(self, options: StageOptions) -> Stage[Any, Any, Any]:
        """The stage that does what the options ask for: this one, or :attr:`served`."""
        if self.served is None or not isinstance(options, ServedOptions):
            return self
        server_options.check(options)
        return self.served if options.asks_server else self


def make_plan(stage: Stage[Any, Any, Any], argv: Sequence[str] | None = None) -> Any:
    """The plan of a command line, by default this process's; UsageError if it cannot work."""
    options = arguments.parse(stage.name, stage.options, argv)
    stage = stage.asked(options)
    model_description.check_division(options)
    try:
        plan = stage.check(options)
        paths = _outputs(stage, options)
        own = (*stage.outputs, "save")
        read = {spelled(name): value for name, value in options.given.items() if name not in own}
        # A run is resumed, and a checkpoint trained, where it lies.
        outputs.check_apart(paths, read, in_place=stage.saves_on_signal and not options.overwrite)
        for path in paths.values():
            locks.check(path)
        model_description.check_tokenizer(plan.options)
    except OSError as error:  # a name too long, or what another user may read
        cause = f"{error.strerror}" if error.strerror else first_line(error)
        remedy = "name another path, or let this user read it and what is above it"
        raise UsageError(f"path {error.filename!s:.200}", cause, remedy) from error
    return plan


def run(stage: Stage[Any, Any, Any], argv: Sequence[str] | None = None) -> None:
    """Run ``stage`` with a command line, by default this process's. A usage error exits with 2."""
    streams.open_missing()
    if stage.saves_on_signal:
        # From the start: imports and loading take longer than a scheduler may wait.
        signals.defer_until_exit()
    try:
        plan = make_plan(stage, argv)
        if plan.options.dry_run:
            dry_run.show(plan.options, plan.source)
    except UsageError as error:
        exit_with_usage_error(error)
    if plan.options.dry_run or plan.options.check:
        return
    stage = stage.asked(plan.options)
    threading.excepthook = outputs.thread_failed
    found = {path: outputs.state(path) for path in _outputs(stage, plan.options).values()}
    named = record.named_inputs(plan.options)
    with open_session(plan.options) as opened:
        opened.named_inputs = named
        if plan.options.sequence_parallel and not stage.sequence_parallel:
            # Confs of large models carry the flag for training.
            logger.info("--sequence-parallel has no effect: %s trains nothing", stage.name)
        try:
            with contextlib.ExitStack() as held:
                for path, before in found.items() if opened.is_main else ():
                    held.enter_context(locks.hold(path, redaction.command()))
                    if outputs.state(path) != before:
                        raise UsageError(
                            f"output {path}", "another run has just made it", "start this one again"
                        )
                plan = _with_hub_names(stage, plan)
                result = stage.work(plan, opened)
            if opened.is_main and stage.show is not None:
                stage.show(plan, result, opened)
        except NotImplementedError as error:  # of a stand-in: says what it lacks and what to do
            logger.debug("not computed here", exc_info=True)
            remedy = "leave out the flag that asks for it; --log-level debug shows where it is"
            raise UsageError(f"{stage.name} on this machine", first_line(error), remedy) from error
        except Exception as error:
            if full := outputs.full_disk(error, found):
                raise full from error
            raise
    if code := stage.exit_code(plan, result):
        sys.exit(code)


def _with_hub_names[Options: StageOptions, P: Plan, Result](
    stage: Stage[Options, P, Result], plan: P
) -> P:
    """The plan, checked again if it names models of a hub, which are described now."""
    held = [each for each in (plan.source, *vars(plan).values()) if isinstance(each, Source)]
    by_location = {source.location: source for source in held}
    fetched = [fetch_configuration(source, plan.options) for source in by_location.values()]
    return stage.check(cast(Options, plan.options)) if any(fetched) else plan


def _outputs(stage: Stage[Any, Any, Any], options: StageOptions) -> dict[str, Path]:
    """The paths of a stage's outputs that are given, by flag."""
    given = {name: getattr(options, name) for name in stage.outputs}
    return {spelled(name): Path(value) for name, value in given.items() if value}


def open_session(options: StageOptions) -> AbstractContextManager[Session]:
    """The session that a stage's options ask for."""
    if options.asks_server:
        return client_session.open_session(
            options.stage,
            options.parallel,
            log_level=options.log_level,
            ignored_flags=options.ignored_flags,
            notices=options.notices,
            progress_bars=not options.disable_tqdm,
        )
    return session.open_session(
        options.stage,
        options.parallel,
        seed=options.seed,
        timeout_minutes=options.distributed_timeout_minutes,
        log_level=options.log_level,
        ignored_flags=options.ignored_flags,
        notices=options.notices,
        progress_bars=not options.disable_tqdm,
    )
