"""The shards of stored features, read row by row, and what each must hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from post_training.common import files
from post_training.common.errors import UsageError

if TYPE_CHECKING:
    import torch

AGAIN = "extract_features.sh --overwrite makes them again"


@dataclass(frozen=True)
class Form:
    """What the rows of a shard have: tokens, states of a token, and how many tokens there are."""

    length: int
    hidden_size: int
    aux_size: int
    vocabulary: int

    def problem(self, shard: Any, count: int) -> str:
        """Why an open shard does not hold ``count`` such rows; empty if it does."""
        shapes = {
            "input_ids": [count, self.length],
            "loss_mask": [count, self.length],
            "hidden_states": [count, self.length, self.hidden_size],
            "aux_hidden_states": [count, self.length, self.aux_size],
        }
        if missing := sorted(shapes.keys() ^ {*shard.keys()}):
            return f"it has not these tensors alone: {', '.join(shapes)} ({missing[0]})"
        for name, shape in shapes.items():
            if (found := shard.get_slice(name).get_shape()) != shape:
                return f"{name} has shape {found}, not {shape}"
        ids, mask = shard.get_tensor("input_ids"), shard.get_tensor("loss_mask")
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocabulary:
            return f"it has tokens that the target, of {self.vocabulary:,} tokens, does not have"
        if mask.numel() and int(mask.max()) > 1:
            return "its masks are not 0 and 1"
        return ""


@dataclass(frozen=True)
class Features:
    """Stored sequences of one part, read row by row; the :class:`Samples` of offline training.

    A shard is compared with its hash in ``outputs``, and with its form, when its first row is read.
    """

    shards: list[tuple[Path, int]]
    outputs: Mapping[Path, Mapping[str, Any]]
    form: Form
    verified: set[Path] = field(default_factory=set)

    def __len__(self) -> int:
        return sum(count for _, count in self.shards)

    def batch(self, indices: Sequence[int]) -> Mapping[str, torch.Tensor]:
        """``input_ids``, ``loss_mask``, ``hidden_states`` and ``aux_hidden_states``."""
        import torch

        rows = [self._row(index) for index in indices]
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        batch["input_ids"] = batch["input_ids"].long()
        return batch

    def tokens(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All token ids and masks, [n, s] each."""
        import torch

        ids, masks = [], []
        for path, count in self.shards:
            self._require_form(path, count)
            with safe_open(path, framework="pt") as shard:
                ids.append(shard.get_tensor("input_ids"))
                masks.append(shard.get_tensor("loss_mask"))
        return torch.cat(ids), torch.cat(masks)

    def _row(self, index: int) -> dict[str, torch.Tensor]:
        for path, count in self.shards:
            if index < count:
                self._verify(path, count)
                with safe_open(path, framework="pt") as shard:
                    return {name: shard.get_slice(name)[index] for name in shard.keys()}  # noqa: SIM118
            index -= count
        raise IndexError(index)

    def _verify(self, path: Path, count: int) -> None:
        if path in self.verified:
            return
        if files.changed(path.parent, [{**self.outputs[path], "file": path.name}]):
            cause = "its content is not what run.json recorded when it was made"
            raise UsageError(str(path), cause, f"copy it again, or {AGAIN}")
        self._require_form(path, count)
        self.verified.add(path)

    def _require_form(self, path: Path, count: int) -> None:
        try:
            with safe_open(path, framework="pt") as shard:
                problem = self.form.problem(shard, count)
        except SafetensorError as error:
            problem = f"it cannot be read: {error}"
        if problem:
            raise UsageError(str(path), problem, AGAIN)
