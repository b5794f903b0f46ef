"""Fine-tune a model on conversations or text; a quantized model with its quantizers in place.

Inputs:  --load, a Megatron checkpoint, quantized or not, or --pretrained-model-path, a Hugging
         Face folder or hub name; --finetune-hf-dataset or --finetune-data-files, conversations, of
         which the answers are learned, or with --all-tokens also text.
Outputs: --save, a checkpoint of the model for each --save-interval, with run.json; in its folder
         training/ metrics.jsonl, curves.png and TensorBoard files. A quantized model keeps its
         scales.

The same command resumes a run that was interrupted. Ended by SIGTERM, SIGUSR1 or a limit, it saves
and exits with code 75. The draft of a checkpoint is trained by eagle3.py, which finetune.sh starts.

    MLM_MODEL_CKPT=/work/Qwen3-8B_quant bash finetune.sh Qwen/Qwen3-8B \\
        --finetune-data-files /data/chat.jsonl
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from post_training.checkpoints import loading
from post_training.checkpoints.source import size_estimate
from post_training.cli.stage import Stage, run
from post_training.common import outputs
from post_training.common.errors import UsageError
from post_training.config.flags import flag, group
from post_training.config.options import StageOptions
from post_training.data import conversation_data, text_data
from post_training.data.options import TrainingTextOptions
from post_training.data.sources import TextSource
from post_training.models.builder import count_parameters
from post_training.training import options as training_options
from post_training.training import run as training_run
from post_training.training.options import TrainingFlags
from post_training.training.run import Run, TrainingPlan, exit_if_asked

if TYPE_CHECKING:
    from post_training.distributed.session import Session
    from post_training.training.trainer import TrainingResult

SEQUENCE_LENGTH = 2048


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(StageOptions):
    # ModelOpt's examples of quantization-aware training have this learning rate.
    DEFAULTS: ClassVar[Mapping[str, Any]] = {
        "finetune_hf_dataset": "Magpie-Align/Magpie-Llama-3.1-Pro-MT-300K-Filtered",
        "train_iters": 1000,
        "lr": 1e-5,
        "min_lr": 1e-6,
        "weight_decay": 0.1,
        "save_interval": 500,
        "eval_interval": 100,
        "log_interval": 10,
    }

    all_tokens: bool = flag(
        False, help="learn every token, of questions too; needed for text without answers"
    )
    text: TrainingTextOptions = group(TrainingTextOptions)
    training: TrainingFlags = group(TrainingFlags)


@dataclass(frozen=True)
class Plan(TrainingPlan):
    options: FinetuneOptions
    text: TextSource


def check(options: FinetuneOptions) -> Plan:
    training = training_options.decide(
        options.training, options, options.seq_length or SEQUENCE_LENGTH
    )
    start = training_run.find_start(options)
    held = start.source.manifest or {}
    if held.get("draft"):
        raise UsageError(
            f"--load {start.source.location}",
            "it has a draft, which was trained for the model as it is",
            "fine-tune the checkpoint without a draft, then train one for the result (eagle3.sh); "
            "finetune.sh trains the draft itself",
        )
    training_run.require_trainable(start.source)
    training_run.check_model(start.source, options, training.seq_length)
    text = options.text.source(options.given)
    _check_text(text, all_tokens=options.all_tokens)
    needed = 2 * size_estimate(start.source, options, optimizer=True)  # one is being written
    outputs.disk_space(start.folder, needed)
    return Plan(options, start, training, text)


def _check_text(text: TextSource, *, all_tokens: bool) -> None:
    if all_tokens:
        text_data.check(text)
        return
    try:
        conversation_data.check(text)
    except UsageError as error:
        remedy = f"{error.remedy}; or learn every token, with --all-tokens"
        raise UsageError(error.what, error.cause, remedy) from error


def finetune(plan: Plan, session: Session) -> TrainingResult:
    """Train to the end, or to an interruption.

    Raises:
        UsageError: for data that cannot be trained on.
    """
    from post_training.training import next_token

    options = plan.options
    this = Run.open(plan, session)
    prepare = text_data.prepare if options.all_tokens else conversation_data.prepare
    parts, content = this.data(prepare, plan.text)
    exit_if_asked(session)
    model = loading.load(this.source, options, session, sequence_parallel=options.sequence_parallel)
    parameters = count_parameters(model)
    exit_if_asked(session)

    def describe(iteration: int) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"parameters": parameters, "iteration": iteration}, {}

    return this.train(model, next_token.task(), parts, content["read"], describe)


def show(plan: Plan, result: TrainingResult, session: Session) -> None:
    found = result.metrics
    names = [name for name in ("cross_entropy", "eval_cross_entropy") if name in found]
    values = ", held out ".join(f"{found[name]:.4f}" for name in names)
    next_step = (
        f"MLM_MODEL_CKPT={plan.start.folder} bash mmlu.sh <conf>, then bash export.sh <conf>"
    )
    training_run.show(plan, result, "fine-tuned", {"cross entropy": values}, next_step)


STAGE = Stage(
    "finetune",
    FinetuneOptions,
    check,
    finetune,
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
