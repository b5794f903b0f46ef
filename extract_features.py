"""Run a model over conversations once and store what its draft is trained from.

Inputs:  --load, a Megatron checkpoint, or --pretrained-model-path, a Hugging Face folder or hub
         name; --finetune-hf-dataset or --finetune-data-files, conversations.
Outputs: --output-dir with train/, valid/ and test/ (98, 1 and 1 %): shards of token ids, answer
         masks, last hidden states and those of the auxiliary layers, with run.json.

Before it starts it says how much disk it takes, and after the first files how much time. The same
command resumes where it was interrupted: shards that are there are kept.

    HF_MODEL_CKPT=/models/Qwen3-0.6B bash extract_features.sh Qwen/Qwen3-0.6B \\
        --finetune-data-files /data/answers.jsonl --output-dir /data/features
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from post_training.checkpoints import loading, record
from post_training.checkpoints.source import Source, fetch_source, find_source
from post_training.cli.stage import Stage, run
from post_training.common import files, report
from post_training.common.errors import UsageError
from post_training.config.batch_size import BatchSize, batch_flag
from post_training.config.checks import at_least, required
from post_training.config.flags import flag, group
from post_training.config.options import StageOptions
from post_training.data import conversation_data
from post_training.data.options import TrainingTextOptions
from post_training.data.sources import TextSource
from post_training.drafts import features, registry
from post_training.drafts import options as draft_options
from post_training.drafts.eagle3.draft import Draft
from post_training.drafts.options import DraftOptions
from post_training.drafts.record import draft_of, recorded_or_planned
from post_training.training import run as training_run

if TYPE_CHECKING:
    from post_training.distributed.session import Session

logger = logging.getLogger("post_training")

DATA = ".data"  # packed tokens, removed at the end


@dataclass(frozen=True, kw_only=True)
class ExtractOptions(StageOptions):
    DEFAULTS: ClassVar[Mapping[str, Any]] = {"finetune_hf_dataset": draft_options.DATASET}

    num_samples: int = flag(128_000, metavar="N", check=at_least(1), help="sequences (%(default)s)")
    output_dir: str | None = flag(metavar="DIR", help="where the features go")
    shard_size: int = flag(
        64, metavar="N", check=at_least(1), help="sequences a file (%(default)s)"
    )
    micro_batch_size: BatchSize = batch_flag("sequences a rank computes at a time")
    text: TrainingTextOptions = group(TrainingTextOptions)
    draft: DraftOptions = group(DraftOptions)


@dataclass(frozen=True)
class Plan:
    """``draft`` says which layers are read; None until a hub name's configuration is there."""

    options: ExtractOptions
    source: Source
    folder: Path
    seq_length: int
    text: TextSource
    draft: Draft | None


def check(options: ExtractOptions) -> Plan:
    folder = Path(required("--output-dir", options.output_dir))
    source = find_source(options)
    length = draft_options.sequence_length(options, source.described)
    at_least(1)("--seq-length", length)
    batch = options.micro_batch_size
    if isinstance(batch, int) and options.shard_size % batch:
        raise UsageError(
            f"--shard-size {options.shard_size}",
            f"it is no multiple of --micro-batch-size {batch}",
            "choose a multiple",
        )
    text = options.text.source(options.given)
    conversation_data.check(text)
    training_run.check_model(source, options, length)
    draft = None
    if source.described:
        draft = recorded_or_planned(options.draft, options, source)
    plan = Plan(options, source, folder, length, text, draft)
    settings = _settings(plan, source, draft) if draft else None
    features.check_folder(folder, settings, overwrite=options.overwrite)
    return plan


def _settings(plan: Plan, source: Source, draft: Draft) -> dict[str, Any]:
    """What must not change between the runs of one extraction, as JSON."""
    options = plan.options
    return {
        **features.identity(source, draft, options.precision),
        "sequence_length": plan.seq_length,
        "num_samples": options.num_samples,
        "shard_size": options.shard_size,
        "data": plan.text.describe(),
        "model": dict(source.entry) if source.is_local else source.huggingface,
    }


def extract_features(plan: Plan, session: Session) -> dict[str, Any]:
    """Write all shards that are not there yet. Returns the manifest on rank 0.

    Raises:
        UsageError: for data without answers, or a disk without room.
    """
    from post_training.distributed import collectives
    from post_training.drafts import extraction
    from post_training.inference.batching import Batching

    options, folder = plan.options, plan.folder
    source = fetch_source(plan.source, options)
    draft = plan.draft
    assert draft is not None  # None with --dry-run alone
    settings = _settings(plan, source, draft)
    collectives.on_first_rank(lambda: extraction.begin(folder, settings, options.overwrite))
    data, content = conversation_data.prepare(
        plan.text,
        loading.tokenizer(source, options),
        plan.seq_length,
        options.num_samples,
        folder / DATA,
        session.show_progress,
    )
    logger.info("data: %s", conversation_data.describe(content))
    read, packed = content.pop("read"), content.pop("packed")
    collectives.on_first_rank(lambda: extraction.require_same_data(folder, packed))
    shards = extraction.plan_shards(data, options.num_samples, options.shard_size)
    size = source.architecture.value("hidden_size")
    extraction.check_room(folder, shards, plan.seq_length, size, draft, options.precision)
    model = loading.load(source, options, session)
    algorithm = registry.find(draft.algorithm)
    if draft_of(source) is None:
        # The hooks on the auxiliary layers come with a draft; its weights do not matter.
        algorithm.attach(model, draft, options.seed)
    model.eval()
    batching = Batching(options.micro_batch_size, "--micro-batch-size")
    extraction.Extraction(model, algorithm, data, folder, batching, session).write(shards)
    fingerprints = collectives.from_all_ranks(features.fingerprint(model))
    made = record.of_run(
        options,
        session,
        source,
        inputs=[*source.inputs(), *read],
        metrics={**content, "extracted": sum(len(shard.rows) for shard in shards)},
        extra={
            "features": {
                **settings,
                "fingerprint": next(each for each in fingerprints if each),
                "shards": [{"file": s.file, "sequences": len(s.rows)} for s in shards],
            }
        },
    )
    if not session.is_main:
        return {}
    shutil.copy(made.metrics.pop("prompts"), folder / conversation_data.PROMPTS)
    shutil.rmtree(folder / DATA)
    files.drop_previous(folder)
    return made.write(folder)


def show(plan: Plan, content: dict[str, Any], session: Session) -> None:
    report.summary(
        "features extracted",
        {
            "sequences": f"{content['metrics']['extracted']:,} x {plan.seq_length:,}",
            "folder": f"{plan.folder} ({report.size(plan.folder)})",
            **report.cost(content),
        },
        next_step=f"bash eagle3.sh <conf> --offline-distillation-data {plan.folder}",
    )


WRITES = ("output_dir",)
STAGE = Stage("extract_features", ExtractOptions, check, extract_features, show, outputs=WRITES)


def main() -> None:
    run(STAGE)


if __name__ == "__main__":
    main()
