"""The text and the questions of a prune run: calibration, perplexity, MMLU."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import torch

from post_training.checkpoints import loading
from post_training.data import options as calibration_options
from post_training.evaluation import mmlu, mmlu_data, perplexity
from post_training.evaluation.mmlu_data import Benchmark
from post_training.pruning.report import Measured
from post_training.pruning.search import Size
from post_training.quantization import calibration

if TYPE_CHECKING:
    from post_training.checkpoints.source import Source
    from post_training.distributed.session import Session
    from post_training.models.architecture import Architecture


class Measure:
    """What a model is ranked and scored by; every method is a collective call.

    Args:
        args: with the flags of ``calibration_options`` and ``mmlu_options``.
        source: the model's, for its tokenizer.
    """

    def __init__(self, args: argparse.Namespace, session: Session, source: Source) -> None:
        self.args = args
        self.tokenizer = loading.tokenizer(source, args)
        samples = calibration_options.load(args, self.tokenizer, source.architecture)
        self.run = calibration.Calibration(samples, args.calib_batch_size, session.show_progress)
        self.benchmark: Benchmark | None = None
        if args.mmlu_dataset:
            self.benchmark = mmlu_data.load(args.mmlu_dataset, args.few_shots)

    def loss(self, model: torch.nn.Module) -> float | None:
        """Mean cross entropy of the first calibration sequences, if it is asked for."""
        count = self.args.prune_score_size
        if not count:
            return None
        rows = self.run.data.input_ids[:count]
        return perplexity.mean_loss(model, rows.split(self.args.calib_batch_size))

    def accuracy(self, model: torch.nn.Module) -> float | None:
        """MMLU accuracy, if it is asked for."""
        if self.benchmark is None:
            return None
        found = mmlu.evaluate(
            model,
            self.tokenizer,
            self.benchmark,
            few_shots=self.args.few_shots,
            fraction=self.args.fraction,
            batch_size=self.args.mmlu_batch_size,
        )
        return found.score.total.accuracy

    def score(self, model: torch.nn.Module) -> float:
        """Of a candidate, larger is better."""
        accuracy = self.accuracy(model)
        if accuracy is not None:
            return accuracy
        loss = self.loss(model)
        return -float("inf") if loss is None else -loss

    def of(self, model: torch.nn.Module, architecture: Architecture, size: Size) -> Measured:
        """Size and scores of one model."""
        return Measured(architecture, size, self.loss(model), self.accuracy(model))
