"""Minitron pruning of a megatron-core model by ModelOpt: widths by activations, layers by cosine.

Each channel, head, expert and layer gets an importance from a calibration run; the least important
ones are cut, alike in every layer (Minitron, arXiv 2407.14679). ModelOpt's searcher does the work.
It is extended here so that its scores are kept with a description of what they are of, and that it
does not print.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import modelopt.torch.nas as mtn
import torch
from megatron.core.transformer import MegatronModule
from modelopt.torch.opt.conversion import ModeloptStateManager
from modelopt.torch.prune.plugins.mcore_minitron import (
    CandidateSubnet,
    MCoreMinitronSearcher,
    get_mcore_minitron_config,
)
from modelopt.torch.prune.pruning import PruneModeRegistry
from modelopt.torch.utils import distributed

from post_training.common.quiet import quiet
from post_training.inference import forward
from post_training.pruning.options import SizeSearch
from post_training.pruning.score_cache import ScoreCache
from post_training.pruning.search import MEBIBYTE
from post_training.pruning.space import PruningSpace


@dataclass(frozen=True)
class PruningResult:
    """What pruning did.

    Attributes:
        config: hyper-parameters by name with their new values.
        kept_layers: numbers of the layers that are left, from 1 as before pruning, ascending.
        layer_scores: importance by layer number.
        candidates: of a search, those that were scored, the best one first.
        fitting: number of architectures within the limits.
        calibrated: whether scores were collected now, rather than taken from the cache.
    """

    config: dict[str, int]
    kept_layers: list[int]
    layer_scores: dict[int, float]
    candidates: list[CandidateSubnet]
    fitting: int
    calibrated: bool


def prune(
    model: MegatronModule,
    target: Mapping[str, int] | SizeSearch,
    space: PruningSpace,
    *,
    acceptable: Callable[[Mapping[str, Any]], bool],
    calibrate: Callable[[torch.nn.Module], None],
    describe_calibration: Callable[[], Mapping[str, Any]],
    score: Callable[[torch.nn.Module], float] | None = None,
    cache: ScoreCache | None = None,
    show_progress: bool = False,
) -> PruningResult:
    """Prune ``model`` in place; a collective call.

    Args:
        model: built with the Transformer Engine layer spec at TP=1.
        target: new values by hyper-parameter, only those that change, or a search.
        acceptable: whether a candidate, given by all its hyper-parameters, may be chosen.
        calibrate: runs the calibration data through the model.
        describe_calibration: of the data that ``calibrate`` ran, for the cache.
        score: of a candidate, larger is better; needed for a search.
        show_progress: let ModelOpt draw its progress bars on this rank.
    """
    steps = get_mcore_minitron_config(
        **{f"{name}_divisor": step for name, step in space.steps.items()}
    )
    layers = model.config.num_layers
    config: dict[str, Any] = {"forward_loop": partial(_scored, calibrate)}
    if isinstance(target, SizeSearch):
        config |= {
            "score_func": score,
            "max_width_pruning": target.max_width,
            "max_depth_pruning": target.max_depth,
            "hparams_to_skip": [name for name in target.skip if space.dimensions[name].original],
            "top_k": target.top_k,
            "candidate_filter": acceptable,
            "seq_length": target.memory.sequence_length,
            "batch_size": target.memory.batch_size,
        }
        constraints: dict[str, Any] = {n: float(v) for n, v in target.limits.items()}
        if "memory" in constraints:
            constraints["memory_mb"] = constraints.pop("memory") / MEBIBYTE
    else:
        constraints = {"export_config": dict(target)}
    searcher = _Searcher()
    searcher.cache, searcher.describe_calibration = cache, describe_calibration
    with quiet(stdout=True, stderr=not show_progress):
        dynamic = mtn.convert(model, [("mcore_minitron", steps)], registry=PruneModeRegistry)
        searcher.search(dynamic, constraints, None, config)
        pruned = mtn.export(dynamic)
    # The architecture says all there is to say about the pruned model; a state of ModelOpt's
    # would only be restored, without effect, by every later stage.
    ModeloptStateManager.remove_state(pruned)
    chosen = dict(searcher.best["ss_config"] if isinstance(target, SizeSearch) else target)
    found = searcher.all_candidates_per_constraint.items()
    fitting: list[CandidateSubnet] = next(
        (each for limits, each in found if dict(limits) == constraints), []
    )
    scored = [each for each in fitting if each.score is not None]
    ranked = searcher.sorted_layers or list(range(1, layers + 1))
    return PruningResult(
        config=chosen,
        kept_layers=sorted(ranked[: chosen.get("num_layers", layers)]),
        layer_scores={number: float(value) for number, value in searcher.layer_scores.items()},
        candidates=sorted(scored, key=lambda each: each.score, reverse=True),
        fitting=len(fitting),
        calibrated=not searcher.reused,
    )


def _scored(calibrate: Callable[[torch.nn.Module], None], dynamic: torch.nn.Module) -> None:
    """Calibrate; a layer that changes nothing, whose score is 0, is the first to go.

    ModelOpt takes a score of 0, or below by rounding, for a layer that saw no data.
    """
    calibrate(dynamic)
    for layer in forward.unwrap(dynamic).decoder.layers:
        layer._scores = max(layer._scores, sys.float_info.min)


class _Searcher(MCoreMinitronSearcher):
    """ModelOpt's searcher with scores that are kept in a :class:`ScoreCache`."""

    cache: ScoreCache | None = None
    describe_calibration: Callable[[], Mapping[str, Any]] = dict
    reused = False  # whether the scores are the cache's

    def load_search_checkpoint(self, strict: bool = True) -> bool:
        device = next(self.model.parameters()).device
        found = self.cache.read(distributed.rank(), device) if self.cache else None
        if found is None:
            return False
        state, calibration = found
        for key, default in self.default_state_dict.items():
            setattr(self, key, state.get(key, default))
        self.describe_calibration = lambda: calibration
        self.reused = True
        return True

    def save_search_checkpoint(self, verbose: bool = False) -> None:
        if self.cache is not None:
            self.cache.write(self.state_dict(), distributed.rank(), self.describe_calibration())
