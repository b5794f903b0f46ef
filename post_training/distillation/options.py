"""What is distilled, from whom: the flags and the YAML file of a distillation. No torch.

The file has the fields of the original's distillation configuration (ModelOpt's
``DistillationConfig``)::

    logit_layers: [output_layer, output_layer]          # student's, teacher's
    intermediate_layer_pairs:                           # student's, teacher's, cosine or mse
      - [decoder.layers.3.input_layernorm, decoder.layers.5.input_layernorm, cosine]
    skip_lm_loss: true            # false: cross entropy with the text's own tokens counts as well
    kd_loss_scale: 1.0            # weight of distillation beside that cross entropy
    logit_kl_temperature: 1.0
    logit_kl_topk: null           # compare the teacher's k most probable tokens only
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import yaml

from post_training.checkpoints.source import find_source
from post_training.common import inputs
from post_training.common.errors import UsageError, suggest
from post_training.config.flags import flag
from post_training.config.options import StageOptions

if TYPE_CHECKING:
    from post_training.checkpoints.source import Source
    from post_training.models.architecture import Architecture

OPTION, TEACHER = "--export-kd-cfg", "--export-kd-teacher-load"
LOSSES = ("cosine", "mse")
_LAYER = re.compile(r"decoder\.layers\.(\d+)(?:\.|$)")


@dataclass(frozen=True)
class DistillConfig:
    """The file's fields; layers are named as in megatron-core, counted from 0."""

    logit_layers: tuple[str, str] = ("output_layer", "output_layer")
    intermediate_layer_pairs: tuple[tuple[str, ...], ...] = ()
    skip_lm_loss: bool = True
    kd_loss_scale: float = 1.0
    logit_kl_temperature: float = 1.0
    logit_kl_topk: int | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class DistillationOptions:
    """Flags of what is distilled, from whom."""

    TITLE: ClassVar[str] = "distillation"

    export_kd_teacher_load: str | None = flag(
        metavar="DIR",
        names=("--teacher",),
        help="the model to learn from: a Megatron checkpoint, a Hugging Face folder or a hub name",
    )
    export_kd_cfg: str | None = flag(
        metavar="YAML",
        help="file with logit_layers, intermediate_layer_pairs, skip_lm_loss, kd_loss_scale, "
        "logit_kl_temperature, logit_kl_topk",
    )


def read(path: str | None) -> DistillConfig:
    """The configuration in a file; the defaults without one.

    Raises:
        UsageError: for a file that cannot be read, unknown fields, or values that cannot be.
    """
    if path is None:
        return DistillConfig()

    what = f"{OPTION} {path}"
    try:
        content = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(what, f"it cannot be read: {error.strerror}", "name a YAML file") from (
            error
        )
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        line = f" in line {where.line + 1}" if where else ""
        raise UsageError(what, f"it is not YAML{line}", "write `field: value` lines") from error
    if content is None:
        return DistillConfig()
    if not isinstance(content, Mapping):
        raise UsageError(what, f"it is a {type(content).__name__}", "write `field: value` lines")
    known = {each.name for each in fields(DistillConfig)}
    for name in content:
        if name not in known:
            hint = suggest(str(name), known) or f"known are {', '.join(sorted(known))}"
            raise UsageError(f"{what}: {name}", "unknown field", hint)
    values = dict(content)
    _check_pairs(what, values)
    _check_numbers(what, values)
    return DistillConfig(**values)


def _check_pairs(what: str, values: dict[str, Any]) -> None:
    layers = values.get("logit_layers", ["output_layer", "output_layer"])
    if not _is_names(layers) or len(layers) != 2:
        raise UsageError(
            f"{what}: logit_layers = {layers!r}",
            "it is no pair of names",
            "[output_layer, output_layer]",
        )
    pairs = values.get("intermediate_layer_pairs") or []
    example = "[[decoder.layers.3.input_layernorm, decoder.layers.5.input_layernorm]]"
    if not isinstance(pairs, list):
        raise UsageError(f"{what}: intermediate_layer_pairs", "it is no list", example)
    for pair in pairs:
        shown = f"{what}: intermediate_layer_pairs {pair!r}"
        if not _is_names(pair) or len(pair) not in (2, 3):
            raise UsageError(shown, "it is no student's and teacher's name", example)
        if len(pair) == 3 and pair[2] not in LOSSES:
            hint = suggest(pair[2], LOSSES) or f"use one of {', '.join(LOSSES)}"
            raise UsageError(shown, f"unknown loss {pair[2]}", hint)
    values["logit_layers"] = tuple(layers)
    values["intermediate_layer_pairs"] = tuple(tuple(pair) for pair in pairs)


def _is_names(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)


def _check_numbers(what: str, values: Mapping[str, Any]) -> None:
    for name in ("kd_loss_scale", "logit_kl_temperature", "logit_kl_topk"):
        value = values.get(name)
        if value is None and (name not in values or name == "logit_kl_topk"):
            continue
        kinds = (int,) if name == "logit_kl_topk" else (int, float)
        if not isinstance(value, kinds) or isinstance(value, bool) or value <= 0:
            raise UsageError(f"{what}: {name} = {value!r}", "not a positive number", "e.g. 1")
    if not isinstance(values.get("skip_lm_loss", True), bool):
        shown = f"{what}: skip_lm_loss = {values['skip_lm_loss']!r}"
        raise UsageError(shown, "neither true nor false", "true or false")


def teacher_options[Options: StageOptions](options: Options, location: str | None) -> Options:
    """``options`` with the teacher at ``location`` in place of the model."""
    if not location:
        raise UsageError(
            f"{TEACHER} (not given)",
            "distillation needs a model to learn from",
            f"set TEACHER_CKPT or {TEACHER} to the model before pruning or quantizing",
        )
    if (Path(location) / "config.json").is_file() or inputs.is_hub_name(location):
        return replace(options, load=None, pretrained_model_path=location)
    return replace(options, load=location)


def check_pair(config: DistillConfig, student: Source, teacher: Source, stages: int) -> None:
    """Raise UsageError for a teacher that this student cannot learn from.

    Args:
        config: what is compared.
        stages: of the pipeline.
    """
    shown = f"{TEACHER} {teacher.location}"
    if any((source.manifest or {}).get("draft") for source in (student, teacher)):
        raise UsageError(
            shown,
            "student or teacher has a draft attached",
            "distill first, then train a draft for the result",
        )
    places = [Path(teacher.location), Path(student.location)]
    if all(each.exists() for each in places) and places[0].samefile(places[1]):
        raise UsageError(shown, "it is the student itself", "name the model before pruning")
    if student.described is None or teacher.described is None:
        return
    mine, theirs = student.architecture, teacher.architecture
    if mine.vocab_size != theirs.vocab_size:
        raise UsageError(
            shown,
            f"its vocabulary has {theirs.vocab_size:,} tokens, the student's {mine.vocab_size:,}: "
            "probabilities of different tokens cannot be compared",
            "name the model that the student was made from",
        )
    if config.logit_kl_topk is not None and config.logit_kl_topk > mine.vocab_size:
        raise UsageError(
            f"{OPTION}: logit_kl_topk = {config.logit_kl_topk}",
            f"the vocabulary has {mine.vocab_size} tokens",
            "a smaller number, or leave it out",
        )
    for pair in config.intermediate_layer_pairs:
        for name, whose, architecture in zip(pair, ("student", "teacher"), (mine, theirs),
                                             strict=False):  # fmt: skip
            _check_layer(name, whose, architecture, stages)


def _check_layer(name: str, whose: str, architecture: Architecture, stages: int) -> None:
    found = _LAYER.match(name)
    if not found:
        return
    layers = architecture.value("num_layers")
    what = f"{OPTION}: intermediate_layer_pairs {name}"
    if int(found[1]) >= layers:
        raise UsageError(
            what, f"the {whose} has {layers} layers, counted from 0", f"at most {layers - 1}"
        )
    first = layers - layers // stages
    if int(found[1]) < first:
        raise UsageError(
            f"{what}, PP={stages}",
            "ModelOpt compares intermediate layers on the last pipeline stage only",
            f"name layers from {first} on, or lower PP",
        )


def find_teacher(options: StageOptions) -> Source:
    """The teacher, from :func:`teacher_options`; no torch, no network.

    Raises:
        UsageError: as :func:`find_source`, in the teacher's name.
    """
    try:
        return find_source(options)
    except UsageError as error:
        what = re.sub(r"--load|--pretrained-model-path", TEACHER, error.what)
        raise UsageError(what, error.cause, error.remedy) from error
