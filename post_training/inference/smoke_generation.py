"""A few continuations by the model that a stage has just saved, to be looked at.

Whatever fails here is a warning: the checkpoint is saved already. Nothing here imports torch before
:func:`run`.
"""

from __future__ import annotations

import argparse
import logging
from typing import TYPE_CHECKING, Any

from post_training.checkpoints import loading
from post_training.data import options as calibration_options

if TYPE_CHECKING:
    from megatron.core.transformer import MegatronModule

    from post_training.checkpoints.source import Source

logger = logging.getLogger("post_training")


def add_arguments(add: Any) -> None:
    """Add the flags with ``add``, the ``add_argument`` of a parser or of its group."""
    add(
        "--prompts",
        default="Hello!|Born in California, Soyer trained as a",
        metavar="A|B",
        help="prompts of the smoke generation",
    )
    add("--references", default="", metavar="A|B", help="texts that it should begin with")
    add("--generate-output-len", type=int, default=32, metavar="N", help="tokens (%(default)s)")
    add("--skip-generate", action="store_true", help="no smoke generation")


def check(args: argparse.Namespace) -> None:
    """Raise UsageError for a length that is not positive."""
    calibration_options.positive(args, "generate_output_len")


def run(args: argparse.Namespace, model: MegatronModule, source: Source) -> None:
    """Let the model continue the prompts; a collective call."""
    from post_training.inference import generation
    from post_training.quantization import quantizers

    if args.skip_generate:
        return
    try:
        tokenizer = loading.tokenizer(source, args)
        prompts = args.prompts.split("|")
        references = args.references.split("|") if args.references else []
        tokens = [tokenizer(prompt)["input_ids"] for prompt in prompts]
        eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        with quantizers.quiet():
            new = generation.generate(
                model, tokens, args.generate_output_len, eos, vocab_size=len(tokenizer)
            )
        for i, (prompt, ids) in enumerate(zip(prompts, new, strict=True)):
            text = tokenizer.decode(ids, skip_special_tokens=True)
            logger.info("smoke generation: %r -> %r", prompt, text)
            if i < len(references) and not text.strip().startswith(references[i].strip()):
                logger.warning("smoke generation: expected %r", references[i])
    except Exception as error:  # any failure: the result is on disk, and must not look lost
        logger.warning(
            "the smoke generation failed: %s: %s. The checkpoint %s is complete.",
            type(error).__name__,
            error,
            args.save,
        )
        logger.debug("smoke generation", exc_info=True)
