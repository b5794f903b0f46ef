"""Prune a model's widths and depth (Minitron); save a smaller Megatron checkpoint.

Inputs:  --load, a Megatron checkpoint, or --pretrained-model-path, a Hugging Face folder or hub
         name; --prune-export-config, the new sizes, or --prune-target-params or
         --prune-target-memory, limits for a search; --calib-dataset, text to rank channels by.
Outputs: --save, a checkpoint of the smaller model, with run.json. It carries its architecture, so
         later stages take the conf of the original. It needs distillation (distill.sh) before use.

    MLM_MODEL_CKPT=/work/Qwen3-8B_mlm bash prune.sh Qwen/Qwen3-8B --prune-target-params 6e9
"""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from post_training import (
    arguments,
    calibration_options,
    checkpoint,
    loading,
    manifest,
    mmlu_options,
    preflight,
    pruning_cache,
    pruning_space,
    smoke_generation,
)
from post_training.errors import UsageError
from post_training.pruning_space import MEANINGS, Dimension, Granularity

if TYPE_CHECKING:
    import torch
    from megatron.core.transformer import MegatronModule

    from post_training.architecture import Architecture
    from post_training.loading import Source
    from post_training.pruning import Search
    from post_training.pruning_report import Measured
    from post_training.runtime import Session

logger = logging.getLogger("post_training")

_DIVISORS = ("hidden_size", "ffn_hidden_size", "num_layers", "num_moe_experts", "mamba_head_dim")
_TARGETS = ("prune_target_params", "prune_target_active_params", "prune_target_memory")
_UNITS = {"": 1, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
_BYTE_UNITS = {
    "": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("prune").add_argument
    add(
        "--prune-export-config",
        metavar="JSON",
        help="new sizes, as a JSON object or a file with one; keys: " + ", ".join(MEANINGS),
    )
    add("--prune-target-params", metavar="N", help="search for at most N parameters: 6e9, 6B")
    add("--prune-target-active-params", metavar="N", help="the same of those used for a token")
    add(
        "--prune-target-memory",
        metavar="BYTES",
        help="search for weights and cache of at most BYTES: 12e9, 12GB, 12GiB",
    )
    add(
        "--prune-memory-sequence-length",
        type=int,
        default=4096,
        metavar="N",
        help="tokens whose cache counts as memory (%(default)s)",
    )
    add(
        "--prune-memory-batch-size",
        type=int,
        default=1,
        metavar="N",
        help="sequences whose cache counts as memory (%(default)s)",
    )
    add(
        "--prune-top-k",
        type=int,
        default=10,
        metavar="N",
        help="candidates that a search scores, the largest that meet the target (%(default)s)",
    )
    add(
        "--prune-max-width-pruning",
        type=float,
        default=0.4,
        metavar="X",
        help="share of each width's values that a search may cut (%(default)s)",
    )
    add(
        "--prune-max-depth-pruning",
        type=float,
        default=0.2,
        metavar="X",
        help="share of the layers that a search may cut (%(default)s)",
    )
    add(
        "--prune-hparams-to-skip",
        default="",
        metavar="A,B",
        help="sizes that a search leaves as they are",
    )
    for name in _DIVISORS:
        add(
            f"--prune-{name.replace('_', '-')}-divisor",
            type=int,
            metavar="N",
            help=f"step of the allowed {MEANINGS[name]} "
            f"({getattr(Granularity, name)}, less for small models)",
        )
    add(
        "--prune-intermediate-ckpt",
        metavar="DIR",
        help="keep the scores here; a later run with another target takes them from there",
    )
    add(
        "--prune-score-size",
        type=int,
        default=16,
        metavar="N",
        help="calibration sequences for the perplexity, which also scores candidates without "
        "--mmlu-dataset; 0: none (%(default)s)",
    )
    calibration_options.add_arguments(add)
    mmlu_options.add_arguments(add, None, "no MMLU; with it: accuracy before, after, of candidates")
    smoke_generation.add_arguments(add)


def check(args: argparse.Namespace) -> None:
    preflight.required(args, "--save", "MLM_MODEL_SAVE")
    smoke_generation.check(args)
    _check_parallel(args)
    source = loading.find(args)
    if source.is_checkpoint and checkpoint.is_quantized(Path(source.location)):
        raise UsageError(
            f"--load {args.load}",
            "it holds a state of ModelOpt: it is quantized, or has a draft attached",
            "prune the checkpoint that convert.sh made; quantize or draft afterwards",
        )
    limits, config = targets(args)
    _check_search(args, searching=bool(limits))
    if source.described is not None:
        preflight.check_layout(source.architecture, args)
        if config is not None:
            allowed = dimensions(args, source.architecture)
            pruning_space.check_export_config(config, allowed)
    kept = cache(args, source)
    if kept is not None:
        kept.described()
    calibration_options.check(args)
    mmlu_options.check(args)
    preflight.check_output(Path(args.save), args, needed=loading.size_estimate(source, 2))


def _check_parallel(args: argparse.Namespace) -> None:
    for name, size in (
        ("TP", args.tensor_model_parallel_size),
        ("EP", args.expert_model_parallel_size),
        ("CP", args.context_parallel_size),
    ):
        if size > 1:
            raise UsageError(
                f"{name}={size}",
                "ModelOpt ranks and cuts whole tensors: pruning runs at TP=1, EP=1 and CP=1",
                f"{name}=1; PP spreads a large model over processes (PP={size}), DP the data",
            )


def _check_search(args: argparse.Namespace, searching: bool) -> None:
    positive = ["prune_top_k", "prune_memory_sequence_length", "prune_memory_batch_size"]
    positive += [f"prune_{name}_divisor" for name in _DIVISORS]
    for name in positive:
        if getattr(args, name) is not None:
            calibration_options.positive(args, name)
    if args.prune_score_size < 0:
        raise UsageError(f"--prune-score-size {args.prune_score_size}", "it is negative", "give 0")
    for name in ("prune_max_width_pruning", "prune_max_depth_pruning"):
        if not 0 <= getattr(args, name) < 1:
            flag = f"--{name.replace('_', '-')} {getattr(args, name)}"
            raise UsageError(flag, "it is no share below 1", "give e.g. 0.4")
    for name in skipped(args):
        preflight.check_choice("--prune-hparams-to-skip", name, list(MEANINGS))
    if searching and not args.mmlu_dataset and not args.prune_score_size:
        raise UsageError(
            "--prune-score-size 0",
            "a search scores its candidates, by perplexity or on --mmlu-dataset",
            "leave it out, or give --mmlu-dataset",
        )


def targets(args: argparse.Namespace) -> tuple[dict[str, float], dict[str, Any] | None]:
    """Limits of a search by name, or the sizes that --prune-export-config names.

    Raises:
        UsageError: unless exactly one kind is given, in a form that can be read.
    """
    given = [name for name in _TARGETS if getattr(args, name) is not None]
    flags = [f"--{name.replace('_', '-')}" for name in given]
    if args.prune_export_config is not None:
        if given:
            raise UsageError(
                f"--prune-export-config with {' '.join(flags)}",
                "sizes are either named or searched for",
                "give one of them",
            )
        return {}, pruning_space.read_export_config(args.prune_export_config)
    if not given:
        raise UsageError(
            "what to prune (not given)",
            "neither sizes nor a target is named",
            """--prune-export-config '{"num_layers": 24}', --prune-target-params 6e9, """
            "or --prune-target-memory 12GB",
        )
    limits = {}
    for name, flag in zip(given, flags, strict=True):
        units = _BYTE_UNITS if name == "prune_target_memory" else _UNITS
        limits[name.removeprefix("prune_target_")] = quantity(flag, getattr(args, name), units)
    return limits, None


def quantity(flag: str, text: str, units: dict[str, float]) -> float:
    """A number with one of ``units``: ``6e9``, ``6B``, ``12 GiB``."""
    found = re.fullmatch(r"([0-9.]+(?:e[+]?[0-9]+)?)\s*([a-z]*)", text.strip().lower())
    known = ", ".join(name.upper() for name in units if name)
    try:
        value = float(found[1]) * units[found[2]] if found else 0.0
    except (KeyError, ValueError):
        value = 0.0
    if not value:
        raise UsageError(f"{flag} {text}", "it is not a positive number", f"6e9, or with {known}")
    return value


def skipped(args: argparse.Namespace) -> tuple[str, ...]:
    """Names that --prune-hparams-to-skip lists."""
    return tuple(name.strip() for name in args.prune_hparams_to_skip.split(",") if name.strip())


def granularity(args: argparse.Namespace, architecture: Architecture) -> Granularity:
    chosen = {name: getattr(args, f"prune_{name}_divisor") for name in _DIVISORS}
    return Granularity.of(architecture, chosen)


def dimensions(args: argparse.Namespace, architecture: Architecture) -> dict[str, Dimension]:
    """What may be pruned of this model."""
    return pruning_space.dimensions(architecture, granularity(args, architecture))


def cache(args: argparse.Namespace, source: Source) -> pruning_cache.ScoreCache | None:
    """Where scores are kept, if anywhere, with what they depend on."""
    if not args.prune_intermediate_ckpt:
        return None
    sizes = arguments.parallel(args)
    search = {name: value for name, value in vars(args).items() if name.startswith("prune_")}
    search |= {n: getattr(args, n) for n in ("mmlu_dataset", "fraction", "few_shots")}
    for name in (*_TARGETS, "prune_export_config", "prune_intermediate_ckpt", "prune_top_k"):
        search.pop(name)
    return pruning_cache.ScoreCache(
        Path(args.prune_intermediate_ckpt),
        manifest.describe_input("model", source.location),
        {
            "pipeline": sizes.pipeline,
            "data": sizes.data,
            "first_layers": sizes.first_layers,
            "last_layers": sizes.last_layers,
        },
        search,
    )


def prune(args: argparse.Namespace, session: Session) -> tuple[MegatronModule, dict[str, Any]]:
    """Load, rank, cut, save. Returns this rank's model and, on rank 0, the manifest.

    Raises:
        UsageError: if the sizes are not allowed, or no architecture meets the target.
    """
    from post_training import model as model_building
    from post_training import pruning, pruning_report
    from post_training.manifest import Manifest

    limits, config = targets(args)
    source = loading.fetch(loading.find(args), args)
    original = source.architecture
    allowed = dimensions(args, original)
    memory = pruning.Memory(args.prune_memory_sequence_length, args.prune_memory_batch_size)
    options = replace(loading.build_options(args, source), layer_spec="transformer_engine")
    transformer = model_building.transformer_config(original, options)
    target: dict[str, int] | Search
    if config is None:
        target = pruning.Search(
            limits,
            args.prune_max_width_pruning,
            args.prune_max_depth_pruning,
            args.prune_top_k,
            skipped(args),
            memory,
        )
        pruning.check_reachable(original, transformer, allowed, target)
    else:
        pruning_space.check_export_config(config, allowed)
        # Unchanged widths would be sorted for nothing.
        target = {name: value for name, value in config.items() if value != allowed[name].original}
    work = Work(args, session, source)
    model = loading.load(source, options, session, trust_remote_code=args.trust_remote_code)
    before = work.measure(model, original, pruning.size(original, transformer, memory))
    outcome = pruning.prune(
        model,
        target,
        granularity(args, original),
        allowed=allowed,
        calibrate=work.calibrate,
        describe_calibration=work.described,
        score=work.score,
        cache=work.cache,
        show_progress=session.show_progress,
    )
    architecture = pruning_space.pruned_architecture(original, outcome.config, outcome.kept_layers)
    for each in outcome.candidates:
        each |= pruning.size(original, transformer, memory, **each["config"]).to_json()
    if session.is_main and outcome.candidates:
        by = "MMLU accuracy" if args.mmlu_dataset else "log-likelihood"
        pruning_report.show_candidates(outcome.candidates, outcome.fitting, by)
    small = pruning.size(original, transformer, memory, **outcome.config)
    actual = model_building.count_parameters(model)
    if actual != small.parameters:
        raise RuntimeError(f"{actual:,} parameters instead of {small.parameters:,} are left")
    after = work.measure(model, architecture, small)
    content = checkpoint.save(
        model,
        Path(args.save),
        Manifest(
            "prune",
            architecture.to_json(),
            configuration=arguments.explicit(args),
            inputs=source.inputs(),
            metrics=pruning_report.metrics(
                outcome, before, after, work.described() if outcome.calibrated else None
            ),
            started=session.started,
            peak_memory_bytes=session.peak_memory(),
            extra={"pruned_from": original.to_json(), **source.pruned_from()},
        ),
        write_huggingface=work.small_files(architecture, outcome.kept_layers),
    )
    if session.is_main:
        pruning_report.show(args, content or {}, outcome, before, after, memory)
    return model, content or {}


class Work:
    """The data of a run and what is done with it: calibration, perplexity, MMLU."""

    def __init__(self, args: argparse.Namespace, session: Session, source: Source) -> None:
        from post_training import calibration, mmlu_data

        self.args, self.source = args, source
        self.tokenizer = loading.tokenizer(source, args)
        self.folder = loading.local_huggingface(source, args)
        self.cache = cache(args, source)
        samples = calibration_options.load(args, self.tokenizer, source.architecture)
        self.run = calibration.Calibration(samples, args.calib_batch_size, session.show_progress)
        self.benchmark = None
        if args.mmlu_dataset:
            self.benchmark = mmlu_data.load(args.mmlu_dataset, args.few_shots)

    def calibrate(self, model: torch.nn.Module) -> None:
        self.run(model)

    def described(self) -> dict[str, Any]:
        return self.run.to_json()

    def loss(self, model: torch.nn.Module) -> float | None:
        """Mean cross entropy of the first calibration sequences, if it is asked for."""
        from post_training import generation, perplexity

        count = self.args.prune_score_size
        if not count:
            return None
        rank, size, _ = generation.data_parallel()
        rows = self.run.data.input_ids[:count]
        # With more ranks than sequences each computes the first one.
        mine = rows[rank::size] if len(rows) >= size else rows[:1]
        return perplexity.mean_loss(model, mine.split(self.args.calib_batch_size))

    def accuracy(self, model: torch.nn.Module) -> float | None:
        """MMLU accuracy, if it is asked for."""
        from post_training import mmlu_evaluation

        if self.benchmark is None:
            return None
        found = mmlu_evaluation.evaluate(
            model,
            self.tokenizer,
            self.benchmark,
            few_shots=self.args.few_shots,
            fraction=self.args.fraction,
            batch_size=self.args.mmlu_batch_size,
        )
        return found.score.total.accuracy

    def score(self, model: torch.nn.Module) -> float:
        """Of a candidate, larger is better."""
        accuracy = self.accuracy(model)
        if accuracy is not None:
            return accuracy
        loss = self.loss(model)
        return -float("inf") if loss is None else -loss

    def measure(self, model: torch.nn.Module, architecture: Architecture, size: Any) -> Measured:
        from post_training.pruning_report import Measured

        return Measured(architecture, size, self.loss(model), self.accuracy(model))

    def small_files(
        self, architecture: Architecture, kept_layers: list[int]
    ) -> Callable[[Path], None]:
        """Writes configuration, adapted to the pruned model, and tokenizer."""
        from post_training import families, files, huggingface

        def write(folder: Path) -> None:
            huggingface.copy_small_files(
                self.folder, folder, python_files=self.args.trust_remote_code
            )
            config = families.with_shape(
                huggingface.read_config(folder), architecture.resolved(), kept_layers
            )
            files.write_json(folder / "config.json", config)

        return write


def main() -> None:
    args = arguments.parse("prune", add_arguments, check)
    from post_training import runtime

    with runtime.session(args) as session:
        model, _ = prune(args, session)
        smoke_generation.run(args, model, loading.find(args))


if __name__ == "__main__":
    main()
