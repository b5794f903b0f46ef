"""EAGLE-3 (Li et al. 2025, arXiv:2503.01840) as an algorithm of the registry. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from post_training.drafts.algorithm import DraftAlgorithm
from post_training.drafts.eagle3 import draft as draft_config
from post_training.drafts.eagle3.draft import Draft

if TYPE_CHECKING:
    import numpy
    import torch

    from post_training.training.task import Task

# Draft tokens that an evaluation proposes at a time, at most.
_EVALUATED_STEPS = 3


class Eagle3(DraftAlgorithm):
    name: ClassVar[str] = draft_config.ALGORITHM
    module: ClassVar[str] = draft_config.MODULE
    configuration = staticmethod(draft_config.configuration)

    def attach(self, model: Any, draft: Draft, seed: int) -> None:
        from post_training.drafts.eagle3 import attach

        attach.attach(model, draft, seed)

    def freeze_target(self, model: Any) -> None:
        from post_training.inference import forward

        for name, parameter in forward.unwrap(model).named_parameters():
            parameter.requires_grad_(name.startswith(f"{self.module}."))

    def set_vocabulary(self, model: Any, counts: numpy.ndarray[Any, Any]) -> float:
        import numpy
        import torch

        from post_training.inference import forward

        core = forward.unwrap(model)
        size = core.eagle_config.draft_vocab_size
        # By falling frequency, then by number; tokens that never occur fill up what is left.
        chosen = numpy.sort(numpy.argsort(-counts, kind="stable")[:size])
        if core.eagle_module is not None:
            # ModelOpt leaves zeros, which stand for the first tokens of the vocabulary.
            core.eagle_module.d2t.copy_(torch.from_numpy(chosen - numpy.arange(size)))
        return float(counts[chosen].sum() / max(1, counts.sum()))

    def task(self, model: Any, draft: Draft) -> Task:
        from post_training.drafts.eagle3 import task

        return task.task(model, draft)

    def features(
        self, model: Any, input_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        from post_training.drafts.eagle3 import task

        return task.features(model, input_ids)

    def acceptance(
        self, model: Any, prompts: Sequence[list[int]], tokens: int, tokenizer: Any
    ) -> Callable[[int], dict[str, float]] | None:
        from post_training.drafts.eagle3 import decoding
        from post_training.inference import forward, generation

        if not generation.supports_prefix(model):
            return None
        ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        steps = min(_EVALUATED_STEPS, int(model.eagle_ttt_steps))

        def measure(_iteration: int) -> dict[str, float]:
            with forward.whole_sequences(forward.unwrap(model)):
                found = decoding.measure(
                    model, prompts, tokens, ends, steps=steps, vocab_size=len(tokenizer)
                )
            return {} if found.length is None else {"acceptance_length": found.length}

        return measure


EAGLE3 = Eagle3()
