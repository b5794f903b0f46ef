"""The tokenizer with which a server's model is asked for tokens, not for text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from post_training.checkpoints import huggingface, tokenizers
from post_training.common.errors import UsageError
from post_training.config.options import StageOptions
from post_training.models import tokenizer_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check(options: StageOptions) -> str:
    """Where the tokenizer is; UsageError if none is named, or its folder has none."""
    location = options.tokenizer_model or options.pretrained_model_path
    if not location:
        raise UsageError(
            "--tokenizer-model (not given)",
            "the server is asked for probabilities of tokens, which the model's tokenizer numbers",
            "name the model's folder or hub name in TOKENIZER_MODEL or HF_MODEL_CKPT",
        )
    if Path(location).exists():
        tokenizer_files.check(location)
    return location


def load(location: str, options: StageOptions) -> PreTrainedTokenizerBase:
    """The tokenizer; that of a hub name is downloaded."""
    if not Path(location).exists():
        trusted = options.trust_remote_code
        location = str(huggingface.resolve(location, weights=False, trust_remote_code=trusted))
    found: PreTrainedTokenizerBase = tokenizers.read(location, options)
    return found
