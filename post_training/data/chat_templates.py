"""Conversations as text: through a tokenizer's chat template. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jinja2

from post_training.common import limits
from post_training.common.errors import UsageError
from post_training.data.document_formats import Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def render(
    document: Document,
    tokenizer: PreTrainedTokenizerBase,
    option: str,
    *,
    ask: bool = False,
    template: str | None = None,
    template_options: Mapping[str, Any] | None = None,
) -> str:
    """Text of ``document``: a conversation through the tokenizer's chat template.

    Without a template the turns' contents are joined by blank lines; callers say so to the user
    (:func:`has_template`).

    Args:
        ask: append the generation prompt, so that the model continues with its answer.
        template: another than the tokenizer's.
        template_options: further variables of the template, such as Qwen3's ``enable_thinking``.

    Raises:
        UsageError: if the template refuses the conversation (such as a system turn).
    """
    if not document.messages:
        return document.text
    if not has_template(tokenizer):
        return "\n\n".join(turn["content"] for turn in document.messages)

    try:
        with limits.of_a_template():
            rendered = tokenizer.apply_chat_template(
                list(document.messages),
                tools=list(document.tools) or None,
                tokenize=False,
                add_generation_prompt=ask,
                chat_template=template,
                **(template_options or {}),
            )
    except (jinja2.TemplateError, TypeError, ValueError, MemoryError, TimeoutError) as error:
        roles = ", ".join(turn["role"] for turn in document.messages)
        raise UsageError(
            f"{option} {document.place}",
            f"the tokenizer's chat template refuses the roles {roles}: {error}",
            "change the conversation to what the template accepts, or give plain text",
        ) from error
    return str(rendered)


def has_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))
