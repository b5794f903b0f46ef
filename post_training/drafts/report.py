"""How a measured draft is reported: JSON, a figure of three panels, tables and a summary."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from post_training.common import files, report
from post_training.common.errors import UsageError

logger = logging.getLogger("post_training")

_NEAR_ONE = 1.1  # below this acceptance length drafting cannot pay
DEFINITION = "acceptance length = tokens per pass of the target: accepted draft tokens + 1"


def write(path: Path, content: Mapping[str, Any]) -> None:
    """The report, and the figure beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, content)
    save_figure(content, figure_of(path))


def figure_of(report_file: Path) -> Path:
    """Where the figure of a report lies."""
    return report_file.with_suffix(".png")


def check_figure(report_file: Path, option: str) -> None:
    """Raise UsageError where the figure would replace the report, or a file without a report."""
    figure, what = figure_of(report_file), f"{option} {report_file}"
    if figure == report_file:
        raise UsageError(what, "its figure gets this name", "name the report FILE.json")
    if figure.is_dir() or (figure.exists() and not report_file.exists()):
        cause = f"its figure would replace {figure}"
        raise UsageError(what, cause, "name another file, or move what is there")


def show(path: Path, content: Mapping[str, Any]) -> None:
    """The tables, the summary and the warnings."""
    print_table(content)
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
        for note in truth["differing_settings"]:
            logger.warning("%s", note)
    rows["report"] = f"{path}, {figure_of(path).name}"
    report.summary("validated", rows)
    warn_of_length(found["acceptance_length"])


def warn_of_length(length: float | None) -> None:
    """Say so where a draft is of no use."""
    if length is None:
        logger.warning("every answer ended with its first token: nothing was verified")
    elif length < _NEAR_ONE:
        logger.warning(
            "acceptance length %.3f is near 1: the draft proposes nothing that the target would "
            "say. Was it trained, for this target (quantized or not), on answers that the target "
            "gave (generate.sh), with this chat template?",
            length,
        )


def print_table(content: Mapping[str, Any]) -> None:
    """Acceptance by category and as a whole, to stdout."""
    from rich.console import Console
    from rich.table import Table

    acceptance, steps = content["acceptance"], content["settings"]["steps"]
    title = f"Draft of {steps} step{'' if steps == 1 else 's'}, {content['settings']['prompts']}"
    table = Table(title=title, title_justify="left", caption=DEFINITION, caption_justify="left")
    table.add_column("category", no_wrap=True)
    for name in ("acceptance length", "95 % interval", "acceptance rate", "answers"):
        table.add_column(name, justify="right")
    for name, each in [*acceptance["categories"].items(), ("all", acceptance)]:
        is_sum = each is acceptance
        if is_sum and acceptance["categories"]:
            table.add_section()
        length, interval, rate = (
            each[key] for key in ("acceptance_length", "interval_95", "acceptance_rate")
        )
        table.add_row(
            name,
            "-" if length is None else f"{length:.3f}",
            "-" if interval is None else f"{interval[0]:.2f} - {interval[1]:.2f}",
            "-" if rate is None else f"{rate:.3f}",
            str(each["answers"]),
            style="bold" if is_sum else None,
        )
    by_position = Table("draft position")
    by_position.add_column("accepted", justify="right")
    for position, rate in enumerate(acceptance["acceptance_rate_by_position"], start=1):
        by_position.add_row(str(position), f"{rate:.3f}")
    Console().print(table, by_position, sep="")


def save_figure(content: Mapping[str, Any], path: Path) -> None:
    """Acceptance length by category, acceptance by draft position, tokens per pass: one PNG."""
    from matplotlib.figure import Figure

    acceptance, steps = content["acceptance"], content["settings"]["steps"]
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    lengths, rates, passes = figure.subplots(1, 3)
    rows = {**acceptance["categories"], "all": acceptance}
    rows = {name: each for name, each in rows.items() if each["acceptance_length"] is not None}
    values = [each["acceptance_length"] for each in rows.values()]
    intervals = [each["interval_95"] or [each["acceptance_length"]] * 2 for each in rows.values()]
    errors = [
        [value - low for value, (low, _) in zip(values, intervals, strict=True)],
        [high - value for value, (_, high) in zip(values, intervals, strict=True)],
    ]
    colors = ["tab:blue"] * (len(rows) - 1) + ["tab:gray"]
    lengths.barh(list(rows), values, xerr=errors, color=colors, capsize=3)
    lengths.invert_yaxis()
    lengths.set(xlim=(1, steps + 1), xlabel="acceptance length, with 95 % interval")
    positions = range(1, steps + 1)
    rates.plot(positions, acceptance["acceptance_rate_by_position"], marker="o")
    rates.set(xticks=positions, ylim=(0, 1), xlabel="draft position", ylabel="accepted share")
    emitted = range(1, steps + 2)
    passes.bar(emitted, acceptance["histogram"])
    passes.set(xticks=emitted, xlabel="tokens emitted by a pass of the target", ylabel="passes")
    title = (
        f"{content['settings']['prompts']}: {acceptance['answers']} answers, {steps} draft steps"
    )
    if acceptance["speed_up"] is not None:
        title += f", {acceptance['speed_up']:.2f} times the speed of plain decoding"
    figure.suptitle(title)
    files.write_whole(path, lambda work: figure.savefig(work, format="png", dpi=120))


def difference_line(each: Mapping[str, Any], decode: Callable[[list[int]], str]) -> str:
    """One line about an answer that differs, with both logits."""
    plain, drafted = each.get("plain"), each.get("speculative")
    if not plain or not drafted:
        return f"answer {each['id']}: one of the two ends before the other"

    def shown(choice: Mapping[str, Any]) -> str:
        return (
            f"{decode([choice['token']])!r} with {choice['logit']:.5f} before "
            f"{decode([choice['second']])!r} with {choice['second_logit']:.5f}"
        )

    reason = "a tie within rounding" if each["rounding"] else "more than rounding explains"
    return (
        f"answer {each['id']} differs at its token {each['position'] + 1}: plain decoding chose "
        f"{shown(plain)}, verification {shown(drafted)}: {reason}"
    )


def exported(metrics: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Lines of the summary about a draft that was exported to ``folder``."""
    layers = metrics["auxiliary_layers"]
    return {
        "draft": f"EAGLE-3, {metrics['draft_vocab_size']:,} tokens, in {folder}",
        "auxiliary layers": f"outputs of {layers} from 0; vLLM counts "
        f"{[layer + 1 for layer in layers]}",
        "draft read back": f"{metrics['tensors_compared']} tensors equal the draft's",
    }


def served(folder: Path, target: str) -> str:
    """The options of vLLM's or SGLang's server for an exported draft, after a space."""
    if target == "sglang":
        return (
            f" --speculative-algorithm EAGLE3 --speculative-draft-model-path {folder} "
            "--speculative-num-steps 3 --speculative-eagle-topk 1 --speculative-num-draft-tokens 4"
        )
    if target != "vllm":
        return ""  # TensorRT-LLM reads it from a file
    described = {"method": "eagle3", "model": str(folder), "num_speculative_tokens": 3}
    return f" --speculative-config '{json.dumps(described)}'"
