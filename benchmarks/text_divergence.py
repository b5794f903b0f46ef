"""How far a checkpoint's predictions of conversations are from another's, over all tokens.

    python benchmarks/text_divergence.py --load CHECKPOINT --reference CHECKPOINT --text FILE.jsonl

Prints the cross entropy of the next token in nats, the mean KL divergence from the reference and
how often both find the same token the most probable one. One process, no parallelism.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from post_training.checkpoints import loading
from post_training.checkpoints.source import Source, fetch_source, find_source
from post_training.cli.stage import Stage, run
from post_training.config.checks import required
from post_training.config.flags import flag
from post_training.config.options import StageOptions

if TYPE_CHECKING:
    import torch

    from post_training.distributed.session import Session


@dataclass(frozen=True, kw_only=True)
class DivergenceOptions(StageOptions):
    reference: str | None = flag(metavar="DIR", help="checkpoint to compare with")
    text: str | None = flag(metavar="FILE", help="conversations")


@dataclass(frozen=True)
class Plan:
    options: DivergenceOptions
    source: Source
    reference: DivergenceOptions
    text: str


def check(options: DivergenceOptions) -> Plan:
    other = replace(options, load=required("--reference", options.reference))
    return Plan(options, find_source(options), other, required("--text", options.text))


def logits(plan: Plan, options: DivergenceOptions, session: Session) -> list[torch.Tensor]:
    """The token ids and log probabilities of each conversation, [s] and [s, vocabulary] in turn."""
    import torch

    from post_training.data import sources
    from post_training.inference import forward

    source = fetch_source(find_source(options), options)
    model, tokenizer = loading.load(source, options, session), loading.tokenizer(source, options)
    found = []
    for document in sources.read_documents(plan.text):
        text = tokenizer.apply_chat_template(list(document.messages), tokenize=False)
        ids = torch.tensor(tokenizer(text).input_ids)
        with torch.inference_mode():
            output = forward.run(forward.unwrap(model), ids[None].to(session.device), None)
        assert output is not None
        found += [ids, output[0, :, : len(tokenizer)].float().log_softmax(-1).cpu()]
    return found


def compare(plan: Plan, session: Session) -> None:
    mine, theirs = (logits(plan, each, session) for each in (plan.options, plan.reference))
    tokens, entropy, divergence, same = 0, 0.0, 0.0, 0
    for ids, ours, reference in zip(mine[::2], mine[1::2], theirs[1::2], strict=True):
        tokens += len(ids) - 1
        entropy -= float(ours[:-1].gather(1, ids[1:, None]).sum())
        divergence += float((reference.exp() * (reference - ours))[:-1].sum())
        same += int((ours.argmax(-1) == reference.argmax(-1))[:-1].sum())
    print(
        f"{tokens} tokens: cross entropy {entropy / tokens:.4f}, KL {divergence / tokens:.5f}, "
        f"same first token {same / tokens:.4f}"
    )


def main() -> None:
    run(Stage("text_divergence", DivergenceOptions, check, compare))


if __name__ == "__main__":
    main()
