"""Importance scores kept between runs of prune, so that another target needs no calibration.

A folder holds ``scores.json`` (of which model, from which text, at which layout) and one file of
ModelOpt's for each rank. ``scores.json`` is written last: without it, files that a killed run left
are not used. Nothing here imports torch before the scores are read or written.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from post_training.common import files, forms, manifest
from post_training.common.errors import UsageError

logger = logging.getLogger("post_training")

OPTION = "--prune-intermediate-ckpt"
_DESCRIPTION = "scores.json"
_FORMAT = 1


class _Calibration(TypedDict):
    sequences: int
    sequence_length: int
    source: str


class _Form(TypedDict):
    format: int
    model: dict[str, Any]
    layout: dict[str, Any]
    calibration: _Calibration
    search: dict[str, Any]


@dataclass(frozen=True)
class ScoreCache:
    """One folder of scores.

    Attributes:
        folder: may not exist yet.
        model: the model to prune, as a manifest describes an input.
        layout: of the pipeline, which decides what each rank's file holds.
        search: what the candidates of a search depend on besides the scores.
    """

    folder: Path
    model: Mapping[str, Any]
    layout: Mapping[str, Any]
    search: Mapping[str, Any]

    def described(self) -> dict[str, Any] | None:
        """What ``scores.json`` says; None without one.

        Raises:
            UsageError: if the scores are of another model or layout, or cannot be read.
        """
        what = f"{OPTION} {self.folder}"
        if self.folder.exists() and not self.folder.is_dir():
            raise UsageError(what, "it is a file", "name a folder")
        path = self.folder / _DESCRIPTION
        if not path.is_file():
            return None
        remedy = "name another folder, or delete this one to calibrate again"
        content: dict[str, Any] = forms.read_json(path, _Form, OPTION, remedy)
        model = content["model"]
        if _identity(model) != _identity(self.model):
            raise UsageError(
                what,
                f"its scores are of the model {model.get('path')} as it was then, not of "
                f"{self.model['path']} as it is now",
                remedy,
            )
        theirs = {name: content[name] for name in ("format", "layout")}
        mine = {"format": _FORMAT, "layout": self.layout}
        if theirs != mine:
            raise UsageError(
                what,
                f"its scores were saved with {theirs}, this run has {mine}",
                "use the same PP, name another folder, or delete this one",
            )
        return content

    def read(self, rank: int, device: Any) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """ModelOpt's search state of this rank and a description of the text that the scores are
        of, or None where some rank has no scores; a collective call.

        Candidates found under other settings of the search are left out.
        """
        from modelopt.torch.utils.serialization import safe_load

        from post_training.distributed.collectives import from_all_ranks

        content = self.described()
        path = self._file(rank)
        found = from_all_ranks(content is not None and path.is_file())
        if not all(found) or content is None:
            return None
        text = content["calibration"]
        logger.info(
            f"importance scores of {self.folder} are used again, no calibration; they are of "
            f"{text['sequences']} sequences of {text['sequence_length']} tokens of {text['source']}"
        )
        state: dict[str, Any] = safe_load(path, map_location=device)
        if content["search"] != self.search:
            state["all_candidates_per_constraint"] = {}
        return state, text

    def write(self, state: Mapping[str, Any], rank: int, calibration: Mapping[str, Any]) -> None:
        """Save this rank's search state, and, once every rank's is there, what they are of."""
        import torch
        from modelopt.torch.utils.serialization import safe_save

        from post_training.distributed.collectives import on_first_rank

        self.folder.mkdir(parents=True, exist_ok=True)
        work = self._file(rank).with_suffix(".incomplete")
        safe_save(dict(state), work)
        work.replace(self._file(rank))
        torch.distributed.barrier()
        content = {
            "format": _FORMAT,
            "model": self.model,
            "layout": self.layout,
            "calibration": calibration,
            "search": self.search,
            "versions": manifest.versions(),
        }
        on_first_rank(lambda: files.write_json(self.folder / _DESCRIPTION, content))

    def _file(self, rank: int) -> Path:
        return self.folder / f"rank{rank}.pth"  # ModelOpt's own name for it


def _identity(model: Mapping[str, Any]) -> Any:
    """What tells two models apart: the hash of manifest or files, else (a hub name) the name."""
    return model.get("manifest_sha256") or model.get("listing_sha256") or model.get("path")
