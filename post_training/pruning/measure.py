"""The text and the questions of a prune run: calibration, perplexity, MMLU."""

from __future__ import annotations

import torch

from post_training.checkpoints import loading
from post_training.checkpoints.source import Source
from post_training.data import options as calibration_options
from post_training.distributed.session import Session
from post_training.evaluation import mmlu, mmlu_data, perplexity
from post_training.evaluation.mmlu_data import Benchmark
from post_training.inference.batching import Batching
from post_training.pruning.options import PruneOptions
from post_training.quantization.calibration import Calibration


class Scorer:
    """What a model is ranked and scored by; every method is a collective call.

    ``source`` has the tokenizer; ``benchmark`` are the questions, where they are read already.
    """

    def __init__(
        self, options: PruneOptions, session: Session, source: Source, benchmark: Benchmark | None
    ) -> None:
        self.options = options
        self.tokenizer = loading.tokenizer(source, options)
        samples = calibration_options.load(
            options.calibration, self.tokenizer, source.architecture, options.seed
        )
        self.batching = Batching(options.calibration.calib_batch_size, "--calib-batch-size")
        self.calibration = Calibration(samples, self.batching, session.show_progress)
        self.benchmark = benchmark
        asked = options.mmlu
        if benchmark is None and asked.mmlu_dataset:
            self.benchmark = mmlu_data.load(asked.mmlu_dataset, asked.few_shots)

    def loss(self, model: torch.nn.Module) -> float | None:
        """Mean cross entropy of the first calibration sequences, in nats, if it is asked for."""
        count = self.options.prune_score_size
        if not count:
            return None
        rows = self.calibration.data.input_ids[:count]
        return perplexity.mean_loss(model, rows, self.batching)

    def accuracy(self, model: torch.nn.Module) -> float | None:
        """MMLU accuracy, if it is asked for."""
        if self.benchmark is None:
            return None
        found = mmlu.evaluate(
            model,
            self.tokenizer,
            self.benchmark,
            few_shots=self.options.mmlu.few_shots,
            fraction=self.options.mmlu.fraction,
            batching=Batching(self.options.mmlu.mmlu_batch_size, "--mmlu-batch-size"),
        )
        return found.score.total.accuracy

    def score(self, model: torch.nn.Module) -> float:
        """Of a candidate, larger is better."""
        accuracy = self.accuracy(model)
        if accuracy is not None:
            return accuracy
        loss = self.loss(model)
        return -float("inf") if loss is None else -loss

    def scores(self, model: torch.nn.Module) -> dict[str, float | None]:
        """Both, for the manifest."""
        return {"loss": self.loss(model), "mmlu_accuracy": self.accuracy(model)}
