"""Flags that say which prompts a model answers, shared by the stages that decode. No torch."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from post_training.common import json_text
from post_training.common.errors import UsageError
from post_training.config.checks import at_least, positive_fraction
from post_training.config.flags import flag
from post_training.data import prompts, provenance, records

OPTION = "--prompts-path"
MT_BENCH = "HuggingFaceH4/mt_bench_prompts"
_ROWS_CHECKED = 10_000  # of local prompts, before anything is loaded


def _json_object(option: str, text: str) -> None:
    """Raise UsageError unless the text is a JSON object."""
    try:
        found = json_text.parse(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UsageError(
            f"{option} {text}",
            "it is no JSON object",
            """quote it for the shell: '{"enable_thinking": false}'""",
        )


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    TITLE: ClassVar[str] = "prompts"

    prompts_path: str | None = flag(
        metavar="PATH_OR_NAME",
        help="JSONL, parquet, CSV or text (a prompt a line), a folder of such, or a hub name "
        "(%(default)s)",
    )
    prompts_split: str | None = flag(
        metavar="NAME", help="of a data set on the hub (train, else its first)"
    )
    prompts_limit: int | None = flag(metavar="N", check=at_least(1), help="the first rows only")
    chat_template_options: str = flag(
        "{}",
        metavar="JSON",
        check=_json_object,
        help="""variables of the chat template, such as '{"enable_thinking": false}'""",
    )

    @property
    def sources(self) -> tuple[str, ...]:
        """Files, folders or a hub name: where the prompts are."""
        return (self.prompts_path,) if self.prompts_path else ()

    @property
    def split(self) -> str | None:
        """Split of a data set on the hub."""
        return self.prompts_split

    @property
    def template_options(self) -> dict[str, Any]:
        """``--chat-template-options`` as a dictionary."""
        return dict(json.loads(self.chat_template_options))


NO_DRAFT = (
    "--draft-length: answers are the target's own with any draft; validate.sh decodes with it"
)
_UNUSED_DRAFT = "of Megatron-LM; unused, since a draft changes no answer"


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    TITLE: ClassVar[str] = "sampling"

    temperature: float = flag(
        0.0,
        metavar="X",
        check=at_least(0, "0 is greedy, 1 is the model's"),
        help="0: greedy (%(default)s)",
    )
    top_k: int = flag(
        0,
        metavar="N",
        check=at_least(0, "give 0 for all tokens"),
        help="sample among the N best; 0: all",
    )
    top_p: float = flag(
        1.0, metavar="X", check=positive_fraction, help="sample among this mass (%(default)s)"
    )
    draft_length: int = flag(0, metavar="N", check=at_least(0), help=_UNUSED_DRAFT)
    draft_topk: int = flag(1, metavar="N", check=at_least(1), help=_UNUSED_DRAFT)

    def to_json(self) -> dict[str, Any]:
        """How tokens are chosen, by the names of a ``Sampler``; the seed is the stage's."""
        return {name: getattr(self, name) for name in ("temperature", "top_k", "top_p")}


def check_sampling(options: SamplingOptions) -> None:
    """Raise UsageError for limits of a choice that is not made."""
    if options.temperature == 0 and (options.top_k or options.top_p < 1):
        raise UsageError(
            f"--top-k {options.top_k} --top-p {options.top_p}",
            "with --temperature 0 the most probable token is taken, and they have no effect",
            "give --temperature too, or leave them out",
        )


@dataclass(frozen=True, kw_only=True)
class GeneratePromptOptions(PromptOptions):
    """Those of generate.py: Megatron-LM's script names its prompts as training data is named."""

    finetune_hf_dataset: str | None = flag(
        metavar="NAME_OR_PATH", help="the same as --prompts-path, which wins"
    )
    finetune_data_split: str | None = flag(metavar="NAME", help="the same as --prompts-split")
    finetune_data_files: tuple[str, ...] | None = flag(
        metavar="FILE", help="files of prompts, instead of --prompts-path"
    )
    fraction: float = flag(
        1.0,
        metavar="X",
        check=positive_fraction,
        help="share of the prompts to answer, the first ones (%(default)s)",
    )

    @property
    def sources(self) -> tuple[str, ...]:
        if self.prompts_path:
            return (self.prompts_path,)
        named = (self.finetune_hf_dataset,) if self.finetune_hf_dataset else ()
        return self.finetune_data_files or named or (MT_BENCH,)

    @property
    def split(self) -> str | None:
        return self.prompts_split or self.finetune_data_split

    def check_sources(self) -> None:
        """Raise UsageError for prompts that are named twice."""
        if not self.finetune_data_files:
            return
        other = self.prompts_path or self.finetune_hf_dataset
        if other:
            raise UsageError(
                f"--finetune-data-files {self.finetune_data_files[0]} with {other}",
                "each says where the prompts are",
                "give one of them; files of a data set on the hub are named after a download",
            )


def check(options: PromptOptions) -> None:
    """Read the first rows of local prompts. Raises UsageError as :func:`load`."""
    for source in options.sources:
        if records.is_local(source):
            limit = min(options.prompts_limit or _ROWS_CHECKED, _ROWS_CHECKED)
            prompts.load(source, OPTION, limit=limit)


def load(options: PromptOptions, fraction: float = 1.0) -> prompts.Prompts:
    """The first of the prompts that the options name, all of them or a ``fraction``.

    Raises:
        UsageError: as :func:`post_training.data.prompts.load`.
    """
    limit = options.prompts_limit
    found: list[prompts.Prompts] = []
    for source in options.sources:
        left = None if limit is None else limit - sum(len(each.dialogues) for each in found)
        if left is None or left > 0:
            found.append(prompts.load(source, OPTION, limit=left, split=options.split))
    dialogues = [dialogue for each in found for dialogue in each.dialogues]
    if len(found) > 1:
        numbered = [each.id == each.number for each in dialogues]  # without an id of its own
        dialogues = [
            replace(each, number=i, id=i if numbered[i] else each.id)
            for i, each in enumerate(dialogues)
        ]
    kept = dialogues[: math.ceil(fraction * len(dialogues))]
    left_out = sum((each.left_out for each in found), Counter[str]())
    return prompts.Prompts(", ".join(each.source for each in found), kept, left_out)


def load_recorded(options: PromptOptions) -> tuple[prompts.Prompts, list[dict[str, Any]]]:
    """As :func:`load`, and the files as a manifest names its inputs.

    Raises:
        UsageError: also if a file is replaced while it is read.
    """
    with provenance.reading("prompts", [(place, OPTION) for place in options.sources]) as read:
        found = load(options)
    return found, read
