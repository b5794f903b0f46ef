"""Train an EAGLE-3 draft for a model: online from conversations, or offline from stored features.

Inputs:  --load, a Megatron checkpoint (a quantized one too), or --pretrained-model-path, a Hugging
         Face folder or hub name; --finetune-hf-dataset or --finetune-data-files, conversations
         whose answers the model itself wrote, or --offline-distillation-data, what
         extract_features.sh stored.
Outputs: --save, a checkpoint of target and draft for each --save-interval, with run.json; in its
         folder training/ metrics.jsonl, curves.png and TensorBoard files.

A draft is attached where the checkpoint has none. The same command resumes a run that was
interrupted. Ended by SIGTERM, SIGUSR1 or a limit, it saves and exits with code 75.

    HF_MODEL_CKPT=/models/Qwen3-0.6B bash eagle3.sh Qwen/Qwen3-0.6B \\
        --finetune-data-files /data/answers.jsonl
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from post_training.checkpoints import loading
from post_training.checkpoints.source import fetch_source, size_estimate
from post_training.cli.stage import Stage, run
from post_training.common import files, manifest, outputs
from post_training.common.errors import UsageError
from post_training.data import conversation_data
from post_training.data.sources import TextSource
from post_training.drafts import features
from post_training.drafts import options as draft_options
from post_training.drafts.eagle3.draft import Draft
from post_training.drafts.options import Eagle3Options
from post_training.drafts.record import draft_of, prepare, to_train
from post_training.models.builder import count_parameters
from post_training.training import options as training_options
from post_training.training import run as training_run
from post_training.training.run import Run, TrainingPlan, exit_if_asked

if TYPE_CHECKING:
    from post_training.distributed.session import Session
    from post_training.training.trainer import TrainingResult


@dataclass(frozen=True)
class Plan(TrainingPlan):
    """``draft`` is None until a hub name is fetched; ``stored`` is read instead of ``text``."""

    options: Eagle3Options
    draft: Draft | None
    text: TextSource
    stored: features.Stored | None


def check(options: Eagle3Options) -> Plan:
    draft_options.check_existing(options)
    start = training_run.find_start(options, after="convert")
    source = start.source
    if start.in_place and draft_of(source) is None:
        raise UsageError(
            f"output folder {start.folder}",
            "it holds a checkpoint without a draft",
            "name another folder in MLM_MODEL_SAVE, and this one in MLM_MODEL_CKPT",
        )
    options = draft_options.noting(options, source)
    stored = None
    length = draft_options.sequence_length(options, source.described)
    folder = options.offline_distillation_data
    # With --dry-run an earlier job may be going to extract the features.
    if folder and (folder.exists() or not options.dry_run):
        stored = features.find(folder, options.seq_length)
        length = stored.sequence_length
    training = training_options.decide(options.training, options, length)
    training_run.check_model(source, options, length)
    draft = None
    if source.described:
        draft = to_train(options.draft, options, source, offline=folder is not None)
    text = options.text.source(options.given)
    if folder is None:
        conversation_data.check(text)
    elif stored is not None and draft is not None:
        features.check_model(stored, source, draft, options.precision)
    needed = 2 * size_estimate(source, options)  # two checkpoints, of which one is being written
    outputs.disk_space(start.folder, needed)
    return Plan(options, start, training, draft, text, stored)


def eagle3(plan: Plan, session: Session) -> TrainingResult | None:
    """Train to the end, or to an interruption; None where conversations are only shown.

    Raises:
        UsageError: for data that cannot be trained on.
    """
    options = plan.options
    if options.show_loss_mask:
        tokenizer = loading.tokenizer(fetch_source(plan.source, options), options)
        if session.is_main:
            conversation_data.print_masks(plan.text, tokenizer, options.show_loss_mask)
        return None
    this, stored = Run.open(plan, session), plan.stored
    parts: Mapping[str, Any]
    if stored is None:
        parts, content = this.data(conversation_data.prepare, plan.text)
        prompts = files.read_json(Path(content["prompts"])) or []
        inputs = content["read"]
    else:
        parts, prompts = stored.parts(), stored.prompts()
        inputs = [manifest.describe_input("features", str(stored.folder))]
    exit_if_asked(session)
    draft = plan.draft
    assert draft is not None  # None with --dry-run alone
    # ModelOpt turns sequence parallelism off in a model without the target's layers.
    split = options.sequence_parallel and not draft.offline
    model = loading.load(this.source, options, session, sequence_parallel=split)
    algorithm = prepare(model, draft, this.source, parts["train"], options.seed)
    if stored is not None:
        features.require_same_model(model, stored, draft, options.precision)
    metrics = {"parameters": count_parameters(model)}
    exit_if_asked(session)
    evaluate = None
    asked = prompts[: options.eval_prompts]
    if asked and not draft.offline:
        tokenizer = loading.tokenizer(this.source, options)
        evaluate = algorithm.acceptance(model, asked, options.eval_output_len, tokenizer)

    def describe(iteration: int) -> tuple[dict[str, Any], dict[str, Any]]:
        return metrics, {"draft": replace(draft, trained=iteration).to_json()}

    task = algorithm.task(model, draft)
    return this.train(model, task, parts, inputs, describe, evaluate)


def show(plan: Plan, result: TrainingResult | None, session: Session) -> None:
    if result is None:
        return
    found = result.metrics
    steps = [name for name in found if name.startswith("eval_accuracy_")]
    length = found.get("eval_acceptance_length")
    rows = {
        "loss": f"{found['loss']:.4f}" if "loss" in found else "-",
        "accuracy by step (held out)": ", ".join(f"{found[n]:.3f}" for n in steps) or "-",
        "acceptance length (held out)": "-" if length is None else f"{length:.2f}",
    }
    next_step = f"MLM_MODEL_CKPT={plan.start.folder} bash validate.sh <conf> --steps 3"
    training_run.show(plan, result, "draft trained", rows, next_step)


STAGE = Stage(
    "eagle3",
    Eagle3Options,
    check,
    eagle3,
    show,
    exit_code=training_run.exit_code,
    outputs=("save",),
    saves_on_signal=True,
    sequence_parallel=True,
)


def main() -> None:
    run(STAGE)


if __name__ == "__main__":
    main()
