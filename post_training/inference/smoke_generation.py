"""A few continuations by the model that a stage has just saved, for a person to look at.

Whatever fails here is a warning: the checkpoint is saved already. No torch before :func:`run`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from post_training.common.quiet import quiet
from post_training.config.checks import at_least
from post_training.config.flags import flag

if TYPE_CHECKING:
    from megatron.core.transformer import MegatronModule

logger = logging.getLogger("post_training")


@dataclass(frozen=True, kw_only=True)
class SmokeOptions:
    TITLE: ClassVar[str] = "smoke generation"

    prompts: str = flag(
        "Hello!|Born in California, Soyer trained as a",
        metavar="A|B",
        help="prompts of the smoke generation",
    )
    references: str = flag("", metavar="A|B", help="texts that it should begin with")
    generate_output_len: int = flag(32, metavar="N", check=at_least(1), help="tokens (%(default)s)")
    skip_generate: bool = flag(False, help="no smoke generation")


def run(options: SmokeOptions, model: MegatronModule, tokenizer: Any, saved: str) -> None:
    """Let the model, ``saved`` already, continue the prompts; a collective call."""
    from post_training.inference import generation

    if options.skip_generate:
        return
    try:
        prompts = options.prompts.split("|")
        references = options.references.split("|") if options.references else []
        tokens = [tokenizer(prompt)["input_ids"] for prompt in prompts]
        eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        with quiet(stdout=True):
            new = generation.generate(
                model, tokens, options.generate_output_len, eos, vocab_size=len(tokenizer)
            )
        for i, (prompt, ids) in enumerate(zip(prompts, new, strict=True)):
            text = tokenizer.decode(ids, skip_special_tokens=True)
            logger.info("smoke generation: %r -> %r", prompt, text)
            if i < len(references) and not text.strip().startswith(references[i].strip()):
                logger.warning("smoke generation: expected %r", references[i])
    except Exception as error:  # any failure: the result is on disk, and must not look lost
        logger.warning(
            "the smoke generation failed: %s: %s. The output %s is complete.",
            *(type(error).__name__, error, saved),
        )
        logger.debug("smoke generation", exc_info=True)
