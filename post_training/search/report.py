"""How a search is reported: JSON, a table, the command that makes the best one. No torch."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from post_training.common.report import number_of_bytes
from post_training.config.flags import spelled
from post_training.data.options import CalibrationOptions
from post_training.quantization.engines import registry as engines
from post_training.quantization.expert_options import ExpertOptions
from post_training.quantization.formats.base import NO_KV_CACHE
from post_training.quantization.search_options import SensitivityOptions
from post_training.search import results
from post_training.search.options import SearchOptions
from post_training.search.results import Result
from post_training.search.space import Space
from post_training.search.trials import Trial

_WIDTH = 130


@dataclass(frozen=True)
class Outcome:
    """What a search has found.

    Attributes:
        results: of trials that could be finished, small ones first.
        failed: name of trial -> why it could not.
        plain_bytes: of the model before.
    """

    results: list[Result]
    failed: Mapping[str, str]
    plain_bytes: int

    @classmethod
    def of(cls, found: Sequence[Result]) -> Outcome:
        failed = {each.trial.name: each.error for each in found if each.error}
        done = sorted((each for each in found if not each.error), key=lambda each: each.size)
        return cls(done, failed, max((each.plain_bytes for each in done), default=0))


def to_json(options: SearchOptions, space: Space, found: Outcome) -> dict[str, Any]:
    """The entries of ``search.json``; ``passed`` says whether a trial meets the budget."""
    front = results.front(found.results)
    meeting = {each.trial.name for each in results.within(options, found.results)}
    best = results.best(options, found.results)
    return {
        "budget": {
            "max_bytes": options.most_bytes,
            "max_kl": options.max_kl,
            "cache_tokens": options.cache_tokens,
        },
        "target": options.target,
        "gpu": options.gpu,
        "plain_bytes": found.plain_bytes,
        "trials": [
            {
                "name": each.trial.name,
                "trial": asdict(each.trial),
                **each.measured(),
                "cache_bytes": each.cache_bytes,
                "on_front": each.trial.name in front,
                "within_budget": each.trial.name in meeting,
            }
            for each in found.results
        ],
        "too_large": space.too_large,
        "refused": dict(space.refused),
        "failed": dict(found.failed),
        "recommended": best and {"name": best.trial.name, "command": command(options, best.trial)},
        "passed": best is not None,
    }


def command(options: SearchOptions, trial: Trial) -> str:
    """What a user types to make the export of a trial.

    At TP or EP above 1 ranks cannot write whole tensors: the checkpoint is exported afterwards, its
    layers spread over as many processes.
    """
    sizes, folder = options.parallel, Path(str(options.search_dir))
    exported = folder.with_name(f"{folder.name}_export")
    layout = {"TP": sizes.tensor, "PP": sizes.pipeline, "EP": sizes.expert, "DP": sizes.data}
    if sizes.expert_tensor != sizes.tensor:
        layout["ETP"] = sizes.expert_tensor
    variables = _model(options, trial)
    variables |= {name: str(size) for name, size in layout.items() if size > 1}
    words = ["quantize.sh", options.conf, trial.formats[0] if trial.bits is None else "auto"]
    words += _flags(options, trial)
    if max(sizes.tensor, sizes.expert, sizes.expert_tensor) == 1:
        return _line({**variables, "EXPORT_DIR": str(exported)}, words)
    saved = str(folder.with_name(f"{folder.name}_quant"))
    spread = {"MLM_MODEL_CKPT": saved, "PP": str(sizes.world // sizes.data)}
    return " && ".join(
        (
            _line({**variables, "MLM_MODEL_SAVE": saved}, words),
            _line(
                {**spread, "EXPORT_DIR": str(exported)},
                ["export.sh", options.conf, "--target", options.target],
            ),
        )
    )


def _line(variables: Mapping[str, str], words: Sequence[str]) -> str:
    """A command line for a shell; of a variable the value is quoted, and not its name."""
    given = [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
    return " ".join((*given, "bash", shlex.join(words)))


def _model(options: SearchOptions, trial: Trial) -> dict[str, str]:
    """The variables that name the model and its tokenizer."""
    loaded = trial.model or options.load
    is_folder = bool(trial.model) and (Path(trial.model) / "config.json").is_file()
    original = trial.model if is_folder else options.pretrained_model_path
    tokenizer = options.tokenizer_model
    found = {
        "MLM_MODEL_CKPT": loaded if loaded and not is_folder else None,
        "HF_MODEL_CKPT": original if original != options.conf else None,
        "TOKENIZER_MODEL": None if tokenizer in (original, options.conf) else tokenizer,
    }
    return {name: value for name, value in found.items() if value}


def _flags(options: SearchOptions, trial: Trial) -> Iterator[str]:
    """The flags of quantize.sh that a trial was made with."""
    if trial.bits is not None:
        yield from ("--auto-quantize-bits", f"{trial.bits:g}")
        yield from ("--auto-quantize-formats", *trial.formats)
    if trial.kv_cache != NO_KV_CACHE:
        yield from ("--export-kv-cache-quant", trial.kv_cache)
    if options.target != engines.DEFAULT:
        yield from ("--target", options.target)
    if options.precision != "bf16":
        yield f"--{options.precision}"
    held: tuple[type, ...] = (CalibrationOptions, ExpertOptions)
    held += (SensitivityOptions,) if trial.bits is not None else ()
    names = [each.name for kind in held for each in fields(kind)]
    for name in (*names, "leave_out", "seed", "trust_remote_code"):
        if name not in options.given or name == "auto_quantize_formats":
            continue
        value = options.given[name]
        yield spelled(name)
        if value is not True:
            yield from map(str, value if isinstance(value, list | tuple) else [value])


def show(options: SearchOptions, content: Mapping[str, Any], found: Outcome) -> None:
    """Print the table, and the command that makes the best one, to stdout."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=_title(content), title_justify="left")
    table.add_column("trial", no_wrap=True)
    for name in ("bits", "size", "of 16-bit", "KL, nats", "95 %", "same top", "perplexity"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    marks = {each["name"]: _mark(each, content) for each in content["trials"]}
    for each in found.results:
        style = {"recommended": "bold", "": "dim"}.get(marks[each.trial.name])
        table.add_row(*_cells(each, found.plain_bytes), marks[each.trial.name], style=style)
    console = Console(width=max(Console().width, _WIDTH))
    console.print(table)
    for name, why in found.failed.items():
        console.print(f"failed: {name}: {why}", highlight=False)
    if content["recommended"]:
        console.print("recommended:", style="bold")
        # As it is: a terminal's width would break words that are to be copied.
        print(content["recommended"]["command"])


def _title(content: Mapping[str, Any]) -> str:
    size, kl = content["budget"]["max_bytes"], content["budget"]["max_kl"]
    limits = [f"at most {number_of_bytes(size)}"] if size is not None else []
    limits += [f"KL at most {kl:g}"] if kl is not None else []
    if tokens := content["budget"]["cache_tokens"]:
        limits.append(f"{tokens:,} tokens' keys and values counted")
    engine = engines.TARGETS[content["target"]].name
    where = f"{engine} on {content['gpu'].title()}" if content["gpu"] else engine
    return f"search for {where}: {', '.join(limits)}"


def _mark(trial: Mapping[str, Any], content: Mapping[str, Any]) -> str:
    if content["recommended"] and trial["name"] == content["recommended"]["name"]:
        return "recommended"
    return "best of its size" if trial["on_front"] else ""


def _cells(each: Result, plain_bytes: int) -> tuple[str, ...]:
    text = each.text or {}
    spread = text["kl"]["interval_95"]
    interval = "" if spread is None else f"{max(0.0, spread[0]):.5f} to {spread[1]:.5f}"
    perplexity = text["model"]["perplexity"]
    return (
        each.trial.name,
        f"{each.bits_per_weight:.2f}",
        ("" if each.exact else "about ") + number_of_bytes(each.size),
        f"{100 * each.size / max(1, plain_bytes):.0f} %",
        f"{each.kl:.6f}",
        interval,
        f"{100 * text['top_1_agreement']['share']:.1f} %",
        "too large" if perplexity is None else f"{perplexity:.4f}",
    )


def missed(options: SearchOptions, found: Outcome) -> str:
    """Why no trial is recommended, with how near the nearest comes."""
    if not found.results:
        return "no trial could be finished"
    small, near = found.results[0], min(found.results, key=lambda each: each.kl)
    return (
        f"no trial is within the budget: the smallest, {small.trial.name}, takes "
        f"{number_of_bytes(small.size)} with a KL divergence of {small.kl:.6f}; the nearest, "
        f"{near.trial.name}, {number_of_bytes(near.size)} with {near.kl:.6f}"
    )
