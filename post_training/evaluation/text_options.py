"""The flags that say which text is predicted, and in which windows. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from post_training.common.errors import UsageError
from post_training.config.checks import at_least
from post_training.config.flags import flag
from post_training.data import document_formats

OPTION = "--text"


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    TITLE: ClassVar[str] = "text"

    text: str | None = flag(
        metavar="PATH_OR_NAME",
        help="what is predicted: JSONL, parquet, CSV or text, a folder of such, or a hub name",
    )
    text_window: int = flag(
        2048,
        metavar="N",
        check=at_least(2),
        help="tokens of a window, at most the model's positions (%(default)s)",
    )
    text_stride: int | None = flag(
        metavar="N",
        check=at_least(1),
        help="tokens from one window to the next (the window: none overlap)",
    )
    text_tokens: int | None = flag(
        metavar="N", check=at_least(1), help="predict the first N tokens only (all)"
    )
    text_batch_size: int = flag(
        1, metavar="N", check=at_least(1), help="windows at a time (%(default)s)"
    )

    layerwise: bool = flag(False, help="one layer in memory at a time, for text alone")

    def lengths(self, positions: int) -> tuple[int, int]:
        """Window and stride for models of that many positions."""
        window = min(self.text_window, positions)
        return window, min(self.text_stride or window, window)


def check(options: TextOptions) -> None:
    """Raise UsageError for text that cannot be read, or windows that leave some of it out."""
    stride = options.text_stride
    if stride is not None and stride > options.text_window:
        raise UsageError(
            f"--text-stride {stride}",
            f"between windows of {options.text_window} tokens some would be left out",
            f"give at most {options.text_window}",
        )
    if options.text is not None:
        document_formats.check(options.text, OPTION)
