"""A model beside the stage's own: a teacher, a reference. No torch."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from post_training.checkpoints.source import Source, find_source
from post_training.common import inputs
from post_training.common.errors import UsageError
from post_training.config.options import StageOptions


def find_second[Options: StageOptions](
    options: Options, location: str, option: str, **how: Any
) -> tuple[Options, Source]:
    """``options`` with the model at ``location`` in place of the stage's own, and that model.

    Args:
        location: a Megatron checkpoint, a Hugging Face folder or a hub name.
        option: the flag that named it, for errors.
        how: as :func:`find_source` takes it.

    Raises:
        UsageError: as :func:`find_source`, in the name of ``option``.
    """
    if (Path(location) / "config.json").is_file() or inputs.is_hub_name(location):
        options = replace(options, load=None, pretrained_model_path=location)
    else:
        options = replace(options, load=location)
    try:
        return options, find_source(options, **how)
    except UsageError as error:
        what = re.sub(r"--load|--pretrained-model-path", option, error.what)
        raise UsageError(what, error.cause, error.remedy) from error
