"""The options of generate.py, and what of them the answers depend on. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from post_training.common import manifest
from post_training.config import checks
from post_training.config.batch_size import BatchSize, batch_flag
from post_training.config.flags import flag, group
from post_training.config.server_options import ServedOptions
from post_training.data.prompts import Prompts
from post_training.inference import options as prompt_options
from post_training.inference.options import GeneratePromptOptions, SamplingOptions


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(ServedOptions):
    output: str | None = flag(metavar="FILE", help="JSONL to write")
    max_new_tokens: int = flag(
        512,
        names=("--osl",),
        metavar="N",
        check=checks.at_least(1),
        help="of an answer (%(default)s)",
    )
    generate_batch_size: BatchSize = batch_flag("sequences at a time")
    sampling: SamplingOptions = group(SamplingOptions)
    prompts: GeneratePromptOptions = group(GeneratePromptOptions)


def asked(options: GenerateOptions) -> dict[str, Any]:
    """Settings of the answers that do not depend on what gives them."""
    prompts = options.prompts
    first, *others = (manifest.describe_input("prompts", each) for each in prompts.sources)
    return {
        "prompts": first,
        **({"further_prompts": others} if others else {}),
        "prompts_split": prompts.split,
        "prompts_limit": prompts.prompts_limit,
        **({"fraction": prompts.fraction} if prompts.fraction < 1 else {}),
        "max_new_tokens": options.max_new_tokens,
        **options.sampling.to_json(),
        "seed": options.seed,
        "chat_template_options": prompts.template_options,
    }


def recorded_prompts(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The inputs that :func:`asked` describes."""
    return [settings["prompts"], *settings.get("further_prompts", ())]


def read_prompts(options: GenerateOptions, recorded: Sequence[Mapping[str, Any]]) -> Prompts:
    """The prompts that the manifest will name; UsageError if they were replaced since the check."""
    prompts = options.prompts
    found = prompt_options.load(prompts, prompts.fraction)
    for entry, location in zip(recorded, prompts.sources, strict=True):
        manifest.require_unchanged(entry, location, "read")
    return found
