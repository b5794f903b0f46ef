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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from post_training.checkpoints.second_model import find_second
from post_training.checkpoints.source import Source
from post_training.common import forms, inputs
from post_training.common.errors import UsageError, suggest
from post_training.config import checks
from post_training.config.flags import flag
from post_training.config.options import StageOptions

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


def _require_torch_dist(option: str, value: str) -> None:
    """Raise UsageError for a checkpoint format that cannot be read."""
    if value != "torch_dist":
        raise UsageError(
            f"{option} {value}",
            "only checkpoints in torch_dist are read",
            "name the teacher's Hugging Face folder, or convert that with convert.sh",
        )


def _refuse_features(option: str, value: str) -> None:
    raise UsageError(
        f"{option} {value}",
        "stored features are for training a draft; a student learns from the teacher's own logits",
        f"leave it out and name the teacher in {TEACHER}; eagle3.sh reads features",
    )


def _require_base(option: str, value: str | bool) -> None:
    """Raise UsageError for training MTP heads."""
    if value not in (False, "base"):
        raise UsageError(
            option if value is True else f"{option} {value}",
            "MTP heads are not trained here: the model without them is",
            "leave it out (--qad-train-target base)",
        )


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
        names=("--export-kd-distill-cfg",),
        help="file with logit_layers, intermediate_layer_pairs, skip_lm_loss, kd_loss_scale, "
        "logit_kl_temperature, logit_kl_topk",
    )
    export_kd_teacher_model_config: str | None = flag(
        metavar="YAML", help="unused: the teacher's run.json or config.json describes it"
    )
    export_kd_teacher_ckpt_format: str = flag(
        "torch_dist",
        choices=("torch", "torch_dist", "torch_dcp"),
        check=_require_torch_dist,
        help="of a teacher's Megatron checkpoint; torch_dist is the only one that is read",
    )
    offline_distillation_data: str | None = flag(
        metavar="DIR",
        check=_refuse_features,
        help="of eagle3; refused, a student needs its teacher",
    )
    qad_train_target: str = flag(
        "base",
        choices=("base", "mtp", "both"),
        check=_require_base,
        help="what is trained of a model with MTP heads; base is the only one",
    )
    freeze_base_for_mtp: bool = flag(
        False, check=_require_base, help="refused: MTP heads are not trained"
    )


def read(path: str | None) -> DistillConfig:
    """The configuration in a file; the defaults without one.

    Raises:
        UsageError: for a file that cannot be read, unknown fields, or values that cannot be.
    """
    if path is None:
        return DistillConfig()
    what = f"{OPTION} {path}"
    remedy = "name a YAML file of `field: value` lines"
    content = forms.read_yaml(inputs.expanded(path), what, remedy)
    if content is None:
        return DistillConfig()
    if not isinstance(content, Mapping):
        raise UsageError(what, f"it is a {type(content).__name__}", remedy)
    values = asdict(DistillConfig())
    for name in content:
        if name not in values:
            hint = suggest(str(name), values) or f"known are {', '.join(sorted(values))}"
            raise UsageError(f"{what}: {name}", "unknown field", hint)
    values |= content
    values["intermediate_layer_pairs"] = values["intermediate_layer_pairs"] or []
    _check(what, values)
    values["logit_layers"] = tuple(values["logit_layers"])
    values["intermediate_layer_pairs"] = tuple(map(tuple, values["intermediate_layer_pairs"]))
    return DistillConfig(**values)


def _check(what: str, values: Mapping[str, Any]) -> None:
    layers, pairs = values["logit_layers"], values["intermediate_layer_pairs"]
    if not _is_names(layers, 2):
        shown = f"{what}: logit_layers = {layers!r}"
        raise UsageError(shown, "it is no pair of names", "[output_layer, output_layer]")
    example = "[[decoder.layers.3.input_layernorm, decoder.layers.5.input_layernorm]]"
    if not isinstance(pairs, list | tuple):
        raise UsageError(f"{what}: intermediate_layer_pairs", "it is no list", example)
    for pair in pairs:
        shown = f"{what}: intermediate_layer_pairs {pair!r}"
        if not _is_names(pair, 2, 3):
            raise UsageError(shown, "it is no student's and teacher's name", example)
        if len(pair) == 3 and pair[2] not in LOSSES:
            hint = suggest(pair[2], LOSSES) or f"use one of {', '.join(LOSSES)}"
            raise UsageError(shown, f"unknown loss {pair[2]}", hint)
    for name in ("kd_loss_scale", "logit_kl_temperature", "logit_kl_topk"):
        value = values[name]
        kinds: Any = int if name == "logit_kl_topk" else (int, float)
        if name == "logit_kl_topk" and value is None:
            continue
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise UsageError(f"{what}: {name} = {value!r:.40}", "not a positive number", "e.g. 1")
        checks.positive_in_file(f"{what}: {name}", value)
    if not isinstance(values["skip_lm_loss"], bool):
        shown = f"{what}: skip_lm_loss = {values['skip_lm_loss']!r}"
        raise UsageError(shown, "neither true nor false", "true or false")


def _is_names(value: Any, *counts: int) -> bool:
    names = value if isinstance(value, list | tuple) else []
    return len(names) in counts and all(isinstance(name, str) for name in names)


def find_teacher[Options: StageOptions](
    options: Options, location: str | None
) -> tuple[Options, Source]:
    """``options`` with the teacher at ``location`` in place of the model, and the teacher; no
    torch, no network.

    Raises:
        UsageError: as :func:`find_second`.
    """
    if not location:
        raise UsageError(
            f"{TEACHER} (not given)",
            "distillation needs a model to learn from",
            f"set TEACHER_CKPT or {TEACHER} to the model before pruning or quantizing",
        )
    return find_second(options, location, TEACHER)


def noting[Options: StageOptions](
    options: Options, wanted: DistillationOptions, teacher: Source
) -> Options:
    """``options`` with what there is to say about ``--export-kd-teacher-model-config``.

    Raises:
        UsageError: for a teacher that nothing but that file would describe.
    """
    path = wanted.export_kd_teacher_model_config
    if path is None:
        return options
    if (
        teacher.is_checkpoint
        and teacher.is_local
        and not (teacher.manifest or {}).get("architecture")
    ):
        raise UsageError(
            f"--export-kd-teacher-model-config {path}",
            f"a teacher is described by its run.json or config.json, and {teacher.location} has "
            "none",
            "name the teacher's Hugging Face folder, or what convert.sh makes of it",
        )
    return options.noting(
        f"--export-kd-teacher-model-config {path} is unused: the teacher's own files describe it"
    )


def check_pair(config: DistillConfig, student: Source, teacher: Source, stages: int) -> None:
    """Raise UsageError for a teacher that this student cannot learn from in that many stages."""
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
    for student_layer, teacher_layer, *_ in config.intermediate_layer_pairs:
        _check_layer(student_layer, "student", mine.value("num_layers"), stages)
        _check_layer(teacher_layer, "teacher", theirs.value("num_layers"), stages)


def _check_layer(name: str, whose: str, layers: int, stages: int) -> None:
    found = _LAYER.match(name)
    if not found:
        return
    what, number = f"{OPTION}: intermediate_layer_pairs {name}", int(found[1])
    if number >= layers:
        cause = f"the {whose} has {layers} layers, counted from 0"
        raise UsageError(what, cause, f"at most {layers - 1}")
    first = layers - layers // stages
    if number < first:
        raise UsageError(
            f"{what}, PP={stages}",
            "ModelOpt compares intermediate layers on the last pipeline stage only",
            f"name layers from {first} on, or lower PP",
        )
