"""Measure a draft by decoding with it: acceptance length, equality with greedy decoding, speed-up.

Acceptance length is the tokens that a forward pass of the target emits, accepted draft tokens and
one of its own, as vLLM counts it: from 1 (the draft is of no use) to --steps + 1.

Inputs:  --load, a checkpoint with a draft (convert.sh --algorithm eagle3, eagle3.sh);
         --prompts-path (MT-Bench's first turns), or --ground-truth-path, which has prompts too.
Outputs: a table, --validate-output as JSON and beside it a figure as PNG; with
         --save-ground-truth-path prompts, greedy answers and settings for a later comparison.

    MLM_MODEL_CKPT=/work/Qwen3-0.6B-Eagle3 STEPS=3 bash validate.sh Qwen/Qwen3-0.6B
"""

from __future__ import annotations

import argparse
import logging
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from post_training.checkpoints import loading
from post_training.checkpoints.source import fetch_source, find_source
from post_training.common import files, manifest, outputs, report
from post_training.common.errors import UsageError
from post_training.config import arguments
from post_training.drafts import ground_truth
from post_training.drafts import measure as validation
from post_training.drafts.record import draft_of, require_draft
from post_training.inference import options as prompts_arguments
from post_training.models import parallel_check

if TYPE_CHECKING:
    from post_training.checkpoints.source import Source
    from post_training.data.prompts import Prompts
    from post_training.distributed.session import Session
    from post_training.drafts.measure import Measured, Question
    from post_training.inference.dialogues import Speaker

logger = logging.getLogger("post_training")

MT_BENCH = "HuggingFaceH4/mt_bench_prompts"
_NEAR_ONE = 1.1  # below this acceptance length drafting cannot pay


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("validate").add_argument
    add("--steps", type=int, default=1, metavar="N", help="draft tokens at a time (%(default)s)")
    add("--osl", type=int, default=64, metavar="N", help="most tokens of an answer (%(default)s)")
    add("--ignore-eos", action="store_true", help="go on after the end, as engines' tests do")
    add("--ground-truth-path", metavar="FILE", help="compare with what a run saved there")
    add("--save-ground-truth-path", metavar="FILE", help="save greedy answers for comparisons")
    add("--lower-bound", type=float, help="exit with code 1 if the acceptance length is below")
    add("--require-identical", action="store_true", help="exit with code 1 if an answer differs")
    add(
        "--validate-output",
        metavar="FILE",
        help="JSON report (beside the model: <model>.validate.json); the figure is FILE.png",
    )
    prompts_arguments.add(parser, default=MT_BENCH)


def check(args: argparse.Namespace) -> None:
    prompts_arguments.positive(args, "steps", "osl")
    if args.lower_bound is not None and not 1 <= args.lower_bound <= args.steps + 1:
        raise UsageError(
            f"--lower-bound {args.lower_bound}",
            f"an acceptance length with --steps {args.steps} is 1 to {args.steps + 1}",
            "give e.g. 2.1 with --steps 3",
        )
    if args.context_parallel_size > 1:
        raise UsageError(
            f"CP={args.context_parallel_size}",
            "sequences are not divided here",
            "leave CP at 1; DP splits the prompts",
        )
    source = find_source(args)
    require_draft(source, args)
    parallel_check.check(source.architecture, arguments.parallel(args))
    if args.ground_truth_path:
        ground_truth.read(Path(args.ground_truth_path))
    if args.ground_truth_path and "prompts_path" not in args.explicit:
        args.prompts_path = None  # it has prompts of its own
    else:
        prompts_arguments.check(args)
    if args.save_ground_truth_path:
        _check_file(Path(args.save_ground_truth_path), "--save-ground-truth-path")
        if Path(args.save_ground_truth_path).exists() and not args.overwrite:
            raise UsageError(
                f"--save-ground-truth-path {args.save_ground_truth_path}",
                "it exists",
                "name another file, or give --overwrite",
            )
    _check_file(report_path(args), "--validate-output")


def validate(args: argparse.Namespace, session: Session) -> dict[str, Any]:
    """Decode every prompt twice, write the report. Returns it on rank 0."""
    from post_training.data import calibration_data
    from post_training.drafts import report as validation_report

    # What needs the hub or a file comes first: a model may take minutes to load.
    saved, read = None, None
    if args.ground_truth_path:
        saved = calibration_data.on_first_rank(
            lambda: ground_truth.read(Path(args.ground_truth_path))
        )
    if args.prompts_path:
        read = calibration_data.on_first_rank(lambda: prompts_arguments.load(args))
        logger.info("%s; the first turn of each is asked", read.describe())
    source = fetch_source(find_source(args), args)
    speaker = load(args, session, source)
    asked, origin = (saved.questions, saved.settings["prompts"]) if saved else ([], "")
    if read is not None:
        asked, origin = questions(args, speaker, read), read.source
    measured = decode(args, session, speaker, asked)
    peak_memory = session.peak_memory()
    if not session.is_main:
        return {}
    acceptance = validation.summarize(measured, args.steps)
    content: dict[str, Any] = {
        "stage": "validate",
        "command": manifest.command(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "configuration": arguments.explicit(args),
        "inputs": source.inputs(),
        "settings": ground_truth.settings(
            asked,
            source=origin,
            steps=args.steps,
            max_new_tokens=args.osl,
            ignore_eos=args.ignore_eos,
        ),
        "acceptance": acceptance,
        "passed": not shortcomings(args, acceptance),
        "draft": draft_of(source).to_json() if draft_of(source) else None,
        "accepted": [{"id": each.question.id, "accepted": each.accepted} for each in measured],
        "peak_memory_bytes": peak_memory,
        "parallel": {
            "tensor": session.parallel.tensor,
            "pipeline": session.parallel.pipeline,
            "data": session.parallel.data,
        },
        "device": str(session.device),
        "versions": manifest.versions(),
        "git_commit": manifest.git_commit(),
    }
    if saved is not None:
        content["ground_truth"], notes = ground_truth.compare(saved, measured, content["settings"])
        for note in notes:
            logger.warning("%s", note)
    write(args, content, measured, speaker)
    for each in content["acceptance"]["differences"]:
        logger.warning("%s", validation_report.difference(each, speaker.tokenizer.decode))
    return content


def load(args: argparse.Namespace, session: Session, source: Source) -> Speaker:
    """The model with its tokenizer; a collective call.

    Raises:
        UsageError: if its attention is of a kind that cannot verify several tokens at a time.
    """
    from post_training.drafts.eagle3 import decoding as speculative
    from post_training.inference import dialogues

    model = loading.load(source, args, session)
    if not speculative.can_verify(model):
        raise UsageError(
            f"--load {args.load}",
            "its attention has a window, chunks or a state, of which several tokens after a cache "
            "are not verified here",
            "measure the exported draft in an engine",
        )
    if draft_of(source) is not None and not draft_of(source).trained:
        logger.warning("the draft of %s has not been trained yet", args.load)
    tokenizer = loading.tokenizer(source, args)
    return dialogues.Speaker(
        model,
        tokenizer,
        [] if args.ignore_eos else loading.end_tokens(source, args, tokenizer),
        source.architecture.max_position_embeddings,
        args.osl,
        template_options=prompts_arguments.template_options(args),
    )


def decode(
    args: argparse.Namespace, session: Session, speaker: Speaker, asked: list[Question]
) -> list[Measured]:
    """Every question's answers, in order, on rank 0; copies of the model share the questions."""
    import torch
    from megatron.core import parallel_state
    from tqdm import tqdm

    from post_training.inference import generation

    rank, copies, _ = generation.data_parallel()
    with tqdm(total=len(asked), unit="answer", disable=not session.show_progress) as bar:
        found = validation.measure(
            speaker.model,
            asked[rank::copies],
            max_new_tokens=args.osl,
            steps=args.steps,
            eos_ids=speaker.eos_ids,
            vocab_size=len(speaker.tokenizer),
            progress=lambda: bar.update(copies),
        )
    # One rank of each copy speaks for it: one that has the logits.
    speaks = parallel_state.get_tensor_model_parallel_rank() == 0
    speaks &= parallel_state.is_pipeline_last_stage()
    gathered: list[Any] = [None] * session.world
    torch.distributed.all_gather_object(gathered, (rank, found if speaks else None))
    shares = {place: each for place, each in gathered if each is not None}
    return [shares[number % copies][number // copies] for number in range(len(asked))]


def questions(args: argparse.Namespace, speaker: Speaker, read: Prompts) -> list[Question]:
    """The first turn of each dialogue, as tokens.

    Raises:
        UsageError: if none leaves room for an answer.
    """
    from post_training.drafts.measure import Question

    found, too_long = [], 0
    for dialogue in read.dialogues:
        first = dialogue.first_turn()
        prompt = speaker.prompt(first, first.messages)
        if len(prompt) + args.osl + args.steps > speaker.context_length:
            too_long += 1
        else:
            found.append(Question(dialogue.id, prompt, dialogue.category))
    if too_long:
        logger.warning("%d prompts leave no room for --osl %d and are left out", too_long, args.osl)
    if not found:
        raise UsageError(
            f"{prompts_arguments.OPTION} {args.prompts_path}",
            f"no prompt leaves room for {args.osl} tokens in the model's {speaker.context_length}",
            "lower --osl, or give shorter prompts",
        )
    return found


def write(
    args: argparse.Namespace,
    content: dict[str, Any],
    measured: list[Measured],
    speaker: Speaker,
) -> None:
    """The report, the figure, and the ground truth if it is asked for."""
    from post_training.drafts import report as validation_report

    path = report_path(args)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, content)
    validation_report.save_figure(content, path.with_suffix(".png"))
    if args.save_ground_truth_path:
        ground_truth.write(
            Path(args.save_ground_truth_path),
            content,
            measured,
            lambda tokens: str(speaker.tokenizer.decode(list(tokens))),
        )


def report_path(args: argparse.Namespace) -> Path:
    """Where the report goes: ``--validate-output``, or beside the model."""
    if args.validate_output:
        return Path(args.validate_output)
    return report.beside(args.load, "validate")


def _check_file(path: Path, option: str) -> None:
    if path.is_dir():
        raise UsageError(f"{option} {path}", "it is a folder", "name a file")
    outputs.writable(path, f"{option} {path}")


def summary(args: argparse.Namespace, content: dict[str, Any]) -> None:
    """The table and the lines below it."""
    from post_training.drafts import report as validation_report

    validation_report.print_table(content)
    found = content["acceptance"]
    rows = {
        "output": f"{found['identical_answers']} of {found['answers']} answers are those of plain "
        "greedy decoding, token for token",
        "plain decoding": f"{found['plain_tokens_per_second']:.1f} tokens/s",
        "speculative": f"{found['speculative_tokens_per_second']:.1f} tokens/s, "
        f"{found['speed_up']:.2f} times plain decoding",
    }
    truth = content.get("ground_truth")
    if truth:
        was = truth["saved_acceptance_length"]
        rows["ground truth"] = (
            f"{truth['same_answers']} of {truth['compared_answers']} answers are the saved ones; "
            f"acceptance length was {was}, is {found['acceptance_length']}"
        )
    rows["report"] = f"{report_path(args)}, {report_path(args).with_suffix('.png').name}"
    report.summary("validated", rows)
    length = found["acceptance_length"]
    if length is None:
        logger.warning("every answer ended with its first token: nothing was verified")
    elif length < _NEAR_ONE:
        logger.warning(
            "acceptance length %.3f is near 1: the draft proposes nothing that the target would "
            "say. Was it trained, for this target (quantized or not), on answers that the target "
            "gave (generate.sh), with this chat template?",
            length,
        )


def main() -> None:
    args = arguments.parse_namespace("validate", add_arguments, check)
    from post_training.cli.stage import open_session

    failed: list[str] = []
    with open_session(args) as session:
        content = validate(args, session)
        if session.is_main:
            summary(args, content)
            failed = shortcomings(args, content["acceptance"])
    for reason in failed:
        print(f"error: {reason}", file=sys.stderr)
    if failed:
        sys.exit(1)


def shortcomings(args: argparse.Namespace, found: dict[str, Any]) -> list[str]:
    """In what the draft falls short of what was asked, from the report's ``acceptance``."""
    failed = []
    length = found["acceptance_length"]
    if args.lower_bound is not None and (length or 0) < args.lower_bound:
        failed.append(f"acceptance length {length} is below {args.lower_bound}")
    if args.require_identical and found["identical_answers"] < found["answers"]:
        failed.append(f"{len(found['differences'])} answers differ from greedy decoding")
    return failed


if __name__ == "__main__":
    main()
