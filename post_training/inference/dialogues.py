"""Answering dialogues with a model: each user turn in order, the model's own answers in context."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from post_training.checkpoints import loading
from post_training.checkpoints.source import Source
from post_training.config.options import StageOptions
from post_training.data import chat_templates
from post_training.data.document_formats import Document
from post_training.data.prompts import Dialogue
from post_training.distributed.session import Session
from post_training.inference import generation
from post_training.inference.answered import CONTEXT, LENGTH, STOP, Answered
from post_training.inference.batching import Batching
from post_training.inference.options import OPTION
from post_training.inference.sampling import Sampler


@dataclass(frozen=True)
class Speaker:
    """A model with its tokenizer, and how it answers.

    Attributes:
        model: as for :func:`post_training.inference.generation.generate`.
        tokenizer: with a chat template for conversations.
        eos_ids: tokens that end an answer.
        context_length: most tokens of a prompt and its answer together.
        max_new_tokens: most tokens of one answer.
        batching: sequences at a time; None: those of :func:`generation.generate`.
        sampler: chooses the next token; the prompts' names become its own.
        template_options: further variables of the chat template.
    """

    model: torch.nn.Module
    tokenizer: PreTrainedTokenizerBase
    eos_ids: Sequence[int]
    context_length: int
    max_new_tokens: int
    batching: Batching | None = None
    sampler: Sampler = field(default_factory=Sampler)
    template_options: Mapping[str, Any] = field(default_factory=dict)

    def prompt(self, dialogue: Dialogue, messages: Sequence[dict[str, Any]]) -> list[int]:
        """Tokens of ``messages`` up to where the model's answer begins.

        Raises:
            UsageError: if the chat template refuses them.
        """
        document = Document(dialogue.place, messages=tuple(messages), tools=dialogue.tools)
        text = chat_templates.render(
            document, self.tokenizer, OPTION, ask=True, template_options=self.template_options
        )
        # A chat template writes the begin-of-text token itself.
        special = not chat_templates.has_template(self.tokenizer)
        encoded = self.tokenizer(text, add_special_tokens=special, verbose=False)
        return list(encoded["input_ids"])

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Tokens as text, special ones such as the end token included or not."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens))

    def answer(
        self, prompts: Sequence[Sequence[int]], names: Sequence[str], progress: Any = None
    ) -> list[list[int]]:
        """New tokens of each prompt; ``names`` distinguish the draws of different prompts."""
        return generation.generate(
            self.model,
            prompts,
            [min(self.max_new_tokens, self.context_length - len(each)) for each in prompts],
            self.eos_ids,
            batching=self.batching,
            vocab_size=len(self.tokenizer),
            choose=replace(self.sampler, names=names),
            progress=progress,
        )


def load_speaker(
    source: Source,
    options: StageOptions,
    session: Session,
    *,
    ignore_eos: bool = False,
    **answering: Any,
) -> Speaker:
    """The model of a local source with its tokenizer; a collective call.

    ``answering`` are fields of :class:`Speaker`; with ``ignore_eos`` no token ends an answer.
    """
    model = loading.load(source, options, session)
    tokenizer = loading.tokenizer(source, options)
    return Speaker(
        model,
        tokenizer,
        [] if ignore_eos else loading.end_tokens(source, options, tokenizer),
        source.architecture.max_position_embeddings,
        **answering,
    )


def answer(
    speaker: Speaker,
    dialogues: Sequence[Dialogue],
    progress: Callable[[int], Any],
) -> list[Answered]:
    """Answer every user turn of ``dialogues``; first turns together, then second turns, ...

    ``progress`` is called with the number of user turns that are done.

    Returns:
        One for each dialogue, in order. A dialogue that outgrows the context ends there: the user
        turn without room for an answer is left out, and so is what follows.
    """
    answered = [Answered(dialogue) for dialogue in dialogues]
    turn = 0
    while waiting := [each for each in answered if each.open]:
        asked = []
        for each in waiting:
            messages = each.asked()
            prompt = speaker.prompt(each.dialogue, messages)
            if len(prompt) >= speaker.context_length:
                each.finish_reasons.append(CONTEXT)
                left = each.dialogue.messages[each.read :]
                progress(sum(message["role"] == "user" for message in left))
            else:
                asked.append((each, messages, prompt))
        answers = speaker.answer(
            [prompt for _, _, prompt in asked],
            [f"{each.dialogue.number}/{turn}" for each, _, _ in asked],
            progress,
        )
        for (each, messages, prompt), tokens in zip(asked, answers, strict=True):
            each.read += len(messages) - len(each.messages)
            text = speaker.decode(tokens, skip_special_tokens=True)
            each.messages = [*messages, {"role": "assistant", "content": text}]
            each.finish_reasons.append(STOP if tokens[-1] in speaker.eos_ids else LENGTH)
            each.prompt_tokens += len(prompt)
            each.generated_tokens += len(tokens)
        turn += 1
    return answered
