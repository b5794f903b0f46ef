"""Documents as windows of tokens, each with the tokens that it is scored on. No torch.

A document of n tokens is cut at 0, ``stride``, 2 * ``stride``, ... into windows of ``length``, the
last of which ends with the document. A token is scored once, in the first window that it is in, and
only if a token stands before it there. With ``stride`` = ``length``, windows do not overlap and the
first token of each is not scored, as in the perplexities of the literature on quantization; a
smaller stride gives each token more context and takes longer. The windows are those of
transformers' guide to perplexity.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from post_training.common.errors import UsageError
from post_training.data import chat_templates, document_formats, provenance, sources

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("post_training")


@dataclass(frozen=True)
class Window:
    """Tokens of one document, at least two, of which the last ``scored`` are predicted."""

    document: int
    tokens: Sequence[int]
    scored: int


@dataclass(frozen=True)
class Text:
    """Windows in the documents' order.

    Attributes:
        documents: how many there are that have something to score.
        source: the path or name as given.
        read: the files, as a manifest describes inputs.
        cut: whether a limit ended the text, in the middle of a document.
    """

    windows: list[Window]
    documents: int
    source: str
    read: tuple[dict[str, Any], ...]
    cut: bool

    @property
    def scored(self) -> int:
        """Tokens that are predicted."""
        return sum(window.scored for window in self.windows)

    def describe(self) -> str:
        """One line for the log."""
        count = len(self.windows)
        return (
            f"{self.scored:,} tokens to predict in {count:,} window{'' if count == 1 else 's'} of "
            f"{self.documents:,} document{'' if self.documents == 1 else 's'} of {self.source}"
        )


def windows(tokens: Sequence[int], length: int, stride: int, document: int = 0) -> Iterator[Window]:
    """Windows of one document; none for a document of fewer than two tokens."""
    seen = 0
    for start in range(0, len(tokens), stride):
        end = min(start + length, len(tokens))
        scored = min(end - seen, end - start - 1)
        if scored > 0:
            yield Window(document, tokens[start:end], scored)
        seen = end
        if end == len(tokens):
            return


def load(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    option: str,
    *,
    length: int,
    stride: int,
    most: int | None = None,
) -> Text:
    """Read ``source`` to its end, or until ``most`` tokens are to be predicted.

    Args:
        source: as :func:`sources.read_documents` takes it; a ``.txt`` file is one document.
        tokenizer: of the model; special tokens are added as it does by default, and chat goes
            through its template.
        option: the flag that named the source, for errors.

    Raises:
        UsageError: nothing to read, malformed content, or a hub that cannot be reached.
    """
    found: list[Window] = []
    documents = scored = 0
    cut = has_chat = False
    with provenance.reading("text", [(source, option)]) as read:
        for document in sources.read_documents(source, option):
            has_chat |= bool(document.messages)
            mine = list(windows(_tokens(document, tokenizer, option), length, stride, documents))
            documents += bool(mine)
            for window in mine:
                found.append(window)
                scored += window.scored
                if cut := most is not None and scored >= most:
                    break
            if cut:
                break
    if not found:
        remedy = "give a file with at least one document of two tokens"
        raise UsageError(f"{option} {source}", "it holds no text to predict", remedy)
    if has_chat and not chat_templates.has_template(tokenizer):
        logger.warning("the tokenizer has no chat template: turns are joined by blank lines")
    if most is not None and scored > most:
        found[-1] = _shortened(found[-1], scored - most)
    return Text(found, documents, source, tuple(read), cut)


def _tokens(
    document: document_formats.Document, tokenizer: PreTrainedTokenizerBase, option: str
) -> list[int]:
    from post_training.data import calibration_data

    pieces = calibration_data.tokens(document, tokenizer, option)
    return [token for piece in pieces for token in piece]


def _shortened(window: Window, by: int) -> Window:
    """Without the last ``by`` tokens, which are fewer than those that it scores."""
    return Window(window.document, window.tokens[: len(window.tokens) - by], window.scored - by)
