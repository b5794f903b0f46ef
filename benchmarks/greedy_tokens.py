"""Greedy tokens of a checkpoint for prompts that are given as text, as JSON.

    python benchmarks/greedy_tokens.py --load CHECKPOINT --prompts-file P.json --output OUT.json

P.json is a list of strings. The output has ``prompt_token_ids``, ``token_ids`` and ``margins`` for
each: by how much the logit of each new token is above the next best.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from post_training.checkpoints import loading
from post_training.checkpoints.source import Source, fetch_source, find_source
from post_training.cli.stage import Stage, run
from post_training.config.checks import at_least, required
from post_training.config.flags import flag
from post_training.config.options import StageOptions

if TYPE_CHECKING:
    from post_training.distributed.session import Session


@dataclass(frozen=True, kw_only=True)
class GreedyOptions(StageOptions):
    prompts_file: str | None = flag(metavar="FILE", help="JSON list of texts")
    output: str | None = flag(metavar="FILE", help="JSON to write")
    max_new_tokens: int = flag(32, metavar="N", check=at_least(1), help="new ones (%(default)s)")


@dataclass(frozen=True)
class Plan:
    options: GreedyOptions
    source: Source
    prompts: list[str]
    output: Path


def check(options: GreedyOptions) -> Plan:
    file = required("--prompts-file", options.prompts_file)
    output = required("--output", options.output)
    prompts = json.loads(Path(file).read_text(encoding="utf-8"))
    return Plan(options, find_source(options), prompts, Path(output))


def greedy_tokens(plan: Plan, session: Session) -> None:
    from post_training.inference import generation

    source = fetch_source(plan.source, plan.options)
    model = loading.load(source, plan.options, session)
    tokenizer = loading.tokenizer(source, plan.options)
    # As an engine does: the text holds the chat template's special tokens already.
    ids = [tokenizer(prompt).input_ids for prompt in plan.prompts]
    new = generation.generate(model, ids, plan.options.max_new_tokens)
    if session.is_main:
        rows = [
            {
                "prompt_token_ids": prompt,
                "token_ids": tokens,
                "margins": margins(model, prompt, tokens),
            }
            for prompt, tokens in zip(ids, new, strict=True)
        ]
        plan.output.write_text(json.dumps(rows), encoding="utf-8")


def margins(model: torch.nn.Module, prompt: list[int], tokens: list[int]) -> list[float]:
    """Differences of the two best logits where each of ``tokens`` was chosen; one process only."""
    from post_training.inference import forward

    core = forward.unwrap(model)
    text = torch.tensor([[*prompt, *tokens]], device=forward.device_of(core))
    with torch.inference_mode():
        logits = forward.run(core, text, None)
    assert logits is not None, "one pipeline stage only"
    best = logits[0, len(prompt) - 1 : -1].float().topk(2).values
    return [round(each, 4) for each in (best[:, 0] - best[:, 1]).tolist()]


STAGE = Stage("greedy_tokens", GreedyOptions, check, greedy_tokens)


def main() -> None:
    run(STAGE)


if __name__ == "__main__":
    main()
