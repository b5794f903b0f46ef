"""Reading a tokenizer from a folder. No torch of its own."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from post_training.common.errors import UsageError, first_line
from post_training.config.options import StageOptions
from post_training.models import tokenizer_files

logger = logging.getLogger("post_training")

_CHANGING = re.compile(r"strftime_now|\|\s*random\b")


def read(location: str, options: StageOptions) -> Any:
    """The tokenizer of a folder; UsageError if transformers cannot load it."""
    from transformers import AutoTokenizer

    tokenizer_files.check_growth(Path(location))
    try:
        found = AutoTokenizer.from_pretrained(location, trust_remote_code=options.trust_remote_code)
    # The tokenizers library raises Exception itself for a file that it cannot read.
    except Exception as error:
        raise UsageError(
            f"tokenizer {location}",
            f"transformers cannot load it: {first_line(error)}",
            "name another folder in TOKENIZER_MODEL, or install the versions that wrote this one",
        ) from error
    if _CHANGING.search(str(found.chat_template or "")):
        logger.warning(
            "the chat template of %s writes the date, or text by chance: the same command gives "
            "other tokens another time",
            location,
        )
    return found
