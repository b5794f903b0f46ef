"""Jobs for tests/helpers/run_stages.py: a draft with known random weights, and decoding with it.

``prepare`` gives every parameter of a draft a value that would show in a wrong place, fills
``d2t``, and saves the checkpoint. ``decode`` decodes some prompts in every way there is and writes
what it found.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from post_training.checkpoints import loading
from post_training.checkpoints.source import Source, find_source
from post_training.cli.stage import Stage
from post_training.config.flags import flag
from post_training.config.options import StageOptions
from post_training.drafts.record import draft_of

STEPS = (1, 3, 5)
NEW_TOKENS = 12
# Few tokens to choose among: so a draft with random weights is right now and then.
FEW = 4
# Draft token t stands for the target's token MAPPING[t].
MAPPING = [2, 0, 3, 1]
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [65], [27, 18, 28, 18, 28, 45, 90, 45, 23, 53, 60, 28]]
TEXT = [(7 * i * i + 3 * i) % 250 for i in range(20)]


@dataclass(frozen=True, kw_only=True)
class JobOptions(StageOptions):
    output: Path | None = flag(help="where the job's findings go")


@dataclass(frozen=True)
class Plan:
    options: JobOptions
    source: Source


def check(options: JobOptions) -> Plan:
    return Plan(options, find_source(options))


def prepare(plan: Plan, session: Any) -> None:
    from dataclasses import replace

    from post_training.checkpoints import torch_dist
    from post_training.checkpoints.huggingface import SmallFiles
    from post_training.common.manifest import Manifest
    from post_training.inference import forward

    source = plan.source
    model = loading.load(source, plan.options, session)
    module = forward.unwrap(model).eagle_module
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            if "norm" in name:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.08)
        if hasattr(module, "d2t"):
            module.d2t.copy_(torch.tensor(MAPPING) - torch.arange(len(MAPPING)))
    draft = replace(draft_of(source), trained=1)
    record = Manifest("prepare", source.architecture.to_json(), extra={"draft": draft.to_json()})
    small_files = SmallFiles(Path(source.huggingface))
    torch_dist.save(model, Path(str(plan.options.save)), record, small_files=small_files)


def decode(plan: Plan, session: Any) -> None:
    from whole_logits import draft_logits, target_features

    from post_training.drafts.eagle3 import decoding as speculative
    from post_training.inference import generation

    model = loading.load(plan.source, plan.options, session)
    found: dict[str, Any] = {}
    with few_tokens(model):
        longer = generation.generate(model, PROMPTS, NEW_TOKENS + max(STEPS) + 1)
        plain = generation.generate(model, PROMPTS, NEW_TOKENS)
        ends = [plain[0][5]]
        found["plain"] = plain
        found["until_end"] = generation.generate(model, PROMPTS, NEW_TOKENS, ends)
        for steps in STEPS:
            decoded = [speculative.decode(model, p, NEW_TOKENS, steps=steps) for p in PROMPTS]
            found[f"tokens {steps}"] = [each.tokens for each in decoded]
            found[f"accepted {steps}"] = [each.accepted for each in decoded]
            if session.world == 1:
                found[f"reference {steps}"] = [
                    recomputed(model, prompt, answer, steps)
                    for prompt, answer in zip(PROMPTS, longer, strict=True)
                ]
        ended = [speculative.decode(model, p, NEW_TOKENS, ends, steps=3) for p in PROMPTS]
        found["until_end 3"] = [each.tokens for each in ended]
        model.train()
        measured = speculative.measure(model, PROMPTS, NEW_TOKENS, steps=3)
        found["measured 3"] = [list(each) for each in measured.accepted]
        found["still training"] = all(module.training for module in model.modules())
    features = target_features(model, TEXT)
    if model.post_process:
        found["features"] = features[:, 0].float().cpu()
        found["draft logits"] = draft_logits(model, TEXT, features[:-1]).cpu()
    results: list[Any] = [None] * session.world
    torch.distributed.all_gather_object(results, found)
    for other in results:
        for name, value in other.items():
            torch.testing.assert_close(value, results[-1][name], rtol=0, atol=0)
    if session.is_main:
        torch.save(results[-1], plan.options.output)


def recomputed(model: Any, prompt: list[int], answer: list[int], steps: int) -> list[int]:
    """Accepted tokens of each verification, by ModelOpt's own evaluation.

    It computes target and draft again over the whole sequence for every round, without any cache.
    ``answer`` is longer than NEW_TOKENS, so that the last verification counts in full.
    """
    accepted, done = [], 0
    while done + 1 < NEW_TOKENS:
        ids = torch.tensor([[*prompt, *answer[:done]]])
        with torch.inference_mode():
            chosen, drafts = model.pseudo_speculative_generate(ids, steps=steps)
        assert int(chosen) == answer[done]
        right = 0
        for draft, token in zip(drafts[0].tolist(), answer[done + 1 :], strict=False):
            if draft != token:
                break
            right += 1
        accepted.append(right)
        done += 1 + right
    return accepted


@contextlib.contextmanager
def few_tokens(model: Any) -> Iterator[None]:
    """Let the model (and a draft that shares its head) choose among the first tokens only."""
    if not model.post_process:
        yield
        return

    def restrict(_module: Any, _inputs: Any, output: Any) -> Any:
        logits, bias = output
        size = logits.shape[-1]
        # Logits of this tensor-parallel rank, or gathered ones.
        first = torch.distributed.get_rank() * size if size < model.vocab_size else 0
        outside = torch.arange(first, first + size, device=logits.device) >= FEW
        return logits.masked_fill(outside, -1e9), bias

    handle = model.output_layer.register_forward_hook(restrict)
    try:
        yield
    finally:
        handle.remove()


JOBS = {work.__name__: Stage(work.__name__, JobOptions, check, work) for work in (prepare, decode)}
