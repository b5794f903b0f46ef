"""Which keys a query sees. All masks here are boolean and True where a key is visible.

The conventions of Transformer Engine, documented at its ``DotProductAttention``: masks that
callers pass are True where a key is *hidden*; ``causal`` and ``padding_causal`` are aligned to
the top left (query i sees keys 0..i), everything else, sliding windows included, to the bottom
right (the last query sees the last key), which is what a step with a cache of keys needs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

MASK_TYPES = frozenset(
    {
        "no_mask",
        "padding",
        "causal",
        "padding_causal",
        "causal_bottom_right",
        "padding_causal_bottom_right",
        "arbitrary",
    }
)


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
        """From a mask type (commas and order of Transformer Engine 1.x are accepted) and a window
        (keys before, keys after), -1 for unlimited.

        Raises:
            ValueError: for an unknown mask type.
        """
        if mask_type not in MASK_TYPES:
            raise ValueError(f"attention mask type {mask_type!r}: one of {sorted(MASK_TYPES)}")
        before, after = window if window is not None else (-1, -1)
        causal = "causal" in mask_type
        if causal:
            after = 0
        elif (before, after) == (-1, 0):
            after = -1
        return cls(before, after, mask_type not in ("causal", "padding_causal"))

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


def visible_keys(
    mask_type: str, attention_mask: torch.Tensor | tuple[torch.Tensor, ...] | None
) -> torch.Tensor | None:
    """The caller's mask, as far as its type uses one: [b or 1, h or 1, sq or 1, skv] or None.

    Padding masks are [b, 1, 1, skv], or a pair of them for queries and keys.

    Raises:
        ValueError: if the type needs a mask and there is none.
    """
    if mask_type in ("no_mask", "causal", "causal_bottom_right"):
        return None
    if attention_mask is None:
        raise ValueError(f"attention mask type {mask_type!r} needs attention_mask")
    if mask_type == "arbitrary":
        if isinstance(attention_mask, tuple):
            raise ValueError("attention mask type 'arbitrary' takes one mask, not a tuple")
        return ~attention_mask.bool()
    if isinstance(attention_mask, tuple):
        queries, keys = attention_mask
    else:
        queries = keys = attention_mask
    visible = ~keys.bool()
    # Rows of padded queries are hidden too: their output is zero.
    return visible & ~queries.bool().transpose(-1, -2)
