"""Minitron pruning of a megatron-core model by ModelOpt: widths by activations, layers by cosine.

Each channel, head, expert and layer gets an importance from a calibration run; the least important
ones are cut, alike in every layer (Minitron, arXiv 2407.14679). ModelOpt's searcher does the work.
It is extended here so that its scores are kept with a description of what they are of, and that it
does not print.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from post_training.pruning.score_cache import ScoreCache
from post_training.pruning.search import MEBIBYTE, Search
from post_training.pruning.space import Dimension, Granularity

if TYPE_CHECKING:
    from megatron.core.transformer import MegatronModule

logger = logging.getLogger("post_training")

_MEMORY = "memory_mb"  # ModelOpt's constraint, in MiB


@dataclass(frozen=True)
class Outcome:
    """What pruning did.

    Attributes:
        config: hyper-parameters by name with their new values.
        kept_layers: numbers of the layers that are left, from 1 as before pruning, ascending.
        layer_scores: importance by layer number.
        candidates: of a search, each with ``config`` and ``score``, the best one first.
        fitting: number of architectures within the limits.
        calibrated: whether scores were collected now, rather than taken from the cache.
    """

    config: dict[str, int]
    kept_layers: list[int]
    layer_scores: dict[int, float]
    candidates: list[dict[str, Any]]
    fitting: int
    calibrated: bool


def prune(
    model: MegatronModule,
    target: Mapping[str, int] | Search,
    granularity: Granularity,
    *,
    allowed: Mapping[str, Dimension],
    acceptable: Callable[[Mapping[str, Any]], bool],
    calibrate: Callable[[torch.nn.Module], None],
    describe_calibration: Callable[[], Mapping[str, Any]],
    score: Callable[[torch.nn.Module], float] | None = None,
    cache: ScoreCache | None = None,
    show_progress: bool = False,
) -> Outcome:
    """Prune ``model`` in place; a collective call.

    Args:
        model: built with the Transformer Engine layer spec at TP=1.
        target: new values by hyper-parameter, only those that change, or a search.
        granularity: steps of the widths.
        allowed: from :func:`pruning_space.dimensions` for the same granularity.
        acceptable: whether a candidate, given by all its hyper-parameters, may be chosen.
        calibrate: runs the calibration data through the model.
        describe_calibration: of the data that ``calibrate`` ran, for the cache.
        score: of a candidate, larger is better; needed for a search.
        cache: where scores are kept.
        show_progress: let ModelOpt draw its progress bars on this rank.
    """
    import modelopt.torch.nas as mtn
    from modelopt.torch.opt.conversion import ModeloptStateManager
    from modelopt.torch.prune.plugins.mcore_minitron import get_mcore_minitron_config
    from modelopt.torch.prune.pruning import PruneModeRegistry

    steps = get_mcore_minitron_config(
        hidden_size_divisor=granularity.hidden_size,
        ffn_hidden_size_divisor=granularity.ffn_hidden_size,
        num_layers_divisor=granularity.num_layers,
        num_moe_experts_divisor=granularity.num_moe_experts,
        mamba_head_dim_divisor=granularity.mamba_head_dim,
    )
    layers = model.config.num_layers
    calibrated = False

    def collect(dynamic: torch.nn.Module) -> None:
        nonlocal calibrated
        calibrated = True
        calibrate(dynamic)

    config: dict[str, Any] = {"forward_loop": collect}
    if isinstance(target, Search):
        config |= {
            "score_func": score,
            "max_width_pruning": target.max_width,
            "max_depth_pruning": target.max_depth,
            "hparams_to_skip": [name for name in target.skip if allowed[name].original],
            "top_k": target.top_k,
            "candidate_filter": acceptable,
            "seq_length": target.memory.sequence_length,
            "batch_size": target.memory.batch_size,
        }
        constraints: dict[str, Any] = {n: float(v) for n, v in target.limits.items()}
        if "memory" in constraints:
            constraints[_MEMORY] = constraints.pop("memory") / MEBIBYTE
    else:
        constraints = {"export_config": dict(target)}
    searcher = _searcher_class()()
    searcher.cache, searcher.describe_calibration = cache, describe_calibration
    with _quiet(show_progress):
        dynamic = mtn.convert(model, [("mcore_minitron", steps)], registry=PruneModeRegistry)
        searcher.search(dynamic, constraints, None, config)
        pruned = mtn.export(dynamic)
    # The architecture says all there is to say about the pruned model; a state of ModelOpt's
    # would only be restored, without effect, by every later stage.
    ModeloptStateManager.remove_state(pruned)
    state = searcher.state_dict()
    chosen = dict(state["best"]["ss_config"] if isinstance(target, Search) else target)
    fitting = _candidates(state["all_candidates_per_constraint"], constraints)
    scored = [each for each in fitting if each.score is not None]
    scored.sort(key=lambda each: each.score, reverse=True)
    ranked = state["sorted_layers"] or range(1, layers + 1)
    return Outcome(
        config=chosen,
        kept_layers=sorted(list(ranked)[: chosen.get("num_layers", layers)]),
        layer_scores={number: float(value) for number, value in state["layer_scores"].items()},
        candidates=[
            {"config": dict(each.ss_config), "score": float(each.score)} for each in scored
        ],
        fitting=len(fitting),
        calibrated=calibrated,
    )


def _candidates(found: Mapping[Any, Any], limits: Mapping[str, float]) -> list[Any]:
    """Those that meet ``limits`` (ModelOpt's constraints), the largest first."""
    for key, candidates in found.items():
        if dict(key) == dict(limits):
            return list(candidates)
    return []


@cache
def _searcher_class() -> Any:
    from modelopt.torch.prune.plugins.mcore_minitron import MCoreMinitronSearcher
    from modelopt.torch.utils import distributed

    class Searcher(MCoreMinitronSearcher):
        """ModelOpt's searcher with scores that are kept in a :class:`ScoreCache`."""

        cache: ScoreCache | None = None
        describe_calibration: Callable[[], Mapping[str, Any]] = dict
        calibrated_on: Mapping[str, Any] | None = None

        def load_search_checkpoint(self, strict: bool = True) -> bool:
            if self.cache is None:
                return False
            device = next(self.model.parameters()).device
            state = self.cache.read(distributed.rank(), device)
            if state is None:
                return False
            for key, default in self.default_state_dict.items():
                setattr(self, key, state.get(key, default))
            self.calibrated_on = (self.cache.described() or {})["calibration"]
            return True

        def save_search_checkpoint(self, verbose: bool = False) -> None:
            if self.cache is not None:
                described = self.calibrated_on or self.describe_calibration()
                self.cache.write(self.state_dict(), distributed.rank(), described)

    return Searcher


@contextlib.contextmanager
def _quiet(show_progress: bool) -> Iterator[None]:
    """Keep ModelOpt's tables off stdout and, where nobody watches, its bars off stderr.

    The log writes to the stderr of before, so what a stage says comes through.
    """
    printed = io.StringIO()
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.redirect_stdout(printed))
            if not show_progress:
                stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            yield
    finally:
        for line in printed.getvalue().splitlines():
            if line.strip():
                logger.debug("ModelOpt: %s", line.rstrip())
        sys.stdout.flush()
