"""Which keys a query sees. All masks here are boolean and True where a key is visible.

The conventions of Transformer Engine, documented at its ``DotProductAttention``: masks that
callers pass are True where a key is *hidden*; ``causal`` is aligned to the top left (query i sees
keys 0..i), everything else, sliding windows included, to the bottom right (the last query sees the
last key), which is what decoding with a KV cache needs.

The types are those of megatron-core's ``AttnMaskType`` (transformer/enums.py) that language models
use: ``arbitrary`` comes from ModelOpt's layer spec (post_training/modelopt/gpt/model_specs.py:62)
and its EAGLE3. Padding masks belong to BERT, T5 and packed sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

MASK_TYPES = ("no_mask", "causal", "causal_bottom_right", "arbitrary")


@dataclass(frozen=True)
class Visibility:
    """The part of a mask that follows from indices alone.

    Attributes:
        before: keys visible before the diagonal, -1 for all.
        after: keys visible after the diagonal, -1 for all.
        bottom_right: whether the diagonal ends at the last key instead of starting at the first.
    """

    before: int
    after: int
    bottom_right: bool

    @classmethod
    def of(cls, mask_type: str, window: tuple[int, int] | None) -> Visibility:
        """From a mask type and a window (keys before, keys after), -1 for unlimited.

        Raises:
            ValueError: for a mask type that is not here.
        """
        if mask_type not in MASK_TYPES:
            raise ValueError(f"attention mask type {mask_type!r}: one of {', '.join(MASK_TYPES)}")
        before, after = window if window is not None else (-1, -1)
        if "causal" in mask_type:
            after = 0
        elif (before, after) == (-1, 0):
            after = -1
        return cls(before, after, mask_type != "causal")

    def is_everything(self, queries: int, keys: int) -> bool:
        """Whether every query sees every key."""
        first = keys - queries if self.bottom_right else 0
        last = first + queries - 1
        nothing_after = self.after < 0 or first + self.after >= keys - 1
        nothing_before = self.before < 0 or last - self.before <= 0
        return nothing_after and nothing_before

    def is_plain_causal(self, queries: int, keys: int) -> bool:
        """Whether it is the square lower triangle (``is_causal`` of PyTorch)."""
        aligned = queries == keys or not self.bottom_right
        return aligned and self.after == 0 and (self.before < 0 or self.before >= queries - 1)

    def rows(
        self, start: int, stop: int, queries: int, keys: int, device: torch.device
    ) -> torch.Tensor | None:
        """The mask of queries ``start`` to ``stop``: [stop - start, keys], None if all True."""
        if self.is_everything(queries, keys):
            return None
        offset = keys - queries if self.bottom_right else 0
        diagonal = torch.arange(start, stop, device=device)[:, None] + offset
        key = torch.arange(keys, device=device)[None, :]
        visible = torch.ones(stop - start, keys, dtype=torch.bool, device=device)
        if self.after >= 0:
            visible &= key <= diagonal + self.after
        if self.before >= 0:
            visible &= key >= diagonal - self.before
        return visible


def visible_keys(mask_type: str, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """The caller's mask, if its type uses one: [b or 1, h or 1, sq or 1, skv] or None.

    Raises:
        ValueError: if the type needs a mask and there is none.
    """
    if mask_type != "arbitrary":
        return None
    if attention_mask is None:
        raise ValueError("attention mask type 'arbitrary' needs attention_mask")
    return ~attention_mask.bool()
