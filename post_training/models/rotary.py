"""Rotary frequencies that megatron-core's own table does not have, put into a built model.

megatron-core computes plain frequencies, YaRN's, and Llama 3's with fixed constants. These are
transformers' formulas (``modeling_rope_utils.py``) for the others, in the same order of float32
operations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from megatron.core.models.common.embeddings.rope_utils import get_pos_emb_on_this_cp_rank
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from post_training.models.architecture import Architecture


class DynamicRotaryEmbedding(RotaryEmbedding):
    """Frequencies that change with the length of the text, once it passes the original one.

    With a cache each token keeps the rotation that it had when it came, as in transformers.
    megatron-core's static cache holds keys that are not rotated yet and rotates all of them at
    each step, so the cache holds the rotations too.

    Args:
        rope: the scaling, of ``rope_type`` ``dynamic`` or ``longrope``.
        base: of the frequencies.
        plain: megatron-core's embedding, whose place it takes.
    """

    depends_on_length: ClassVar[bool] = True
    # Of longer texts all tokens are computed again; None: each keeps what it had.
    switches_after: int | None = None

    _table: torch.Tensor

    def __init__(self, rope: Mapping[str, Any], base: float, plain: RotaryEmbedding) -> None:
        torch.nn.Module.__init__(self)
        self.cp_group = plain.cp_group
        self._interleaved = plain.rotary_interleaved
        self._plain, self._rope, self._base = plain.inv_freq, dict(rope), base
        self._compute = dynamic
        if rope["rope_type"] == "longrope":
            self._compute = longrope
            self.switches_after = int(rope["original_max_position_embeddings"])

    def kind_of(self, length: int) -> int:
        """What texts of two lengths have in common if all their tokens are rotated alike."""
        original = self._rope["original_max_position_embeddings"]
        return int(length > original) if self.switches_after else max(length, int(original))

    def get_rotary_seq_len(self, inference_context: Any, *args: Any, **kwargs: Any) -> int:
        """Rows of the table, which is computed here: a cache's room is not the text's length."""
        rows: int = super().get_rotary_seq_len(inference_context, *args, **kwargs)
        if inference_context is None:
            self._table = self._rotations(rows)
            return rows
        start = int(inference_context.sequence_len_offset)
        end = start + super().get_rotary_seq_len(None, *args, **kwargs)
        now = self._rotations(end)
        before = getattr(inference_context, "rotations", now.new_zeros(rows, *now.shape[1:]))
        before[start:end] = now[start:]
        inference_context.rotations = self._table = before
        return rows

    def forward(
        self, max_seq_len: int, offset: int = 0, packed_seq: bool = False, cp_group: Any = None
    ) -> torch.Tensor:
        """Rotations [max_seq_len, 1, 1, dim] of the text that :meth:`get_rotary_seq_len` saw."""
        table = self._table[offset : offset + max_seq_len]
        group = self.cp_group if cp_group is None else cp_group
        if group is not None and group.size() > 1 and not packed_seq:
            table = get_pos_emb_on_this_cp_rank(table, 0, group)
        return table

    def _rotations(self, length: int) -> torch.Tensor:
        frequencies = self._compute(self._rope, self._base, 2 * self._plain.numel(), length)
        angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)
        pairs = (
            angles.repeat_interleave(2, -1) if self._interleaved else torch.cat([angles] * 2, -1)
        )
        device = torch.device("cuda") if torch.cuda.is_available() else self._plain.device
        return pairs[:, None, None, :].to(device)


def scale(model: Any, architecture: Architecture) -> None:
    """Give ``model`` the frequencies of ``architecture.rope_parameters``, if it has them."""
    rope = architecture.rope_parameters
    if rope is None:
        return
    plain, base = model.rotary_pos_emb, architecture.rotary_base
    if rope["rope_type"] in ("dynamic", "longrope"):
        model.rotary_pos_emb = DynamicRotaryEmbedding(rope, base, plain)
        for layer in model.decoder.layers:
            # megatron-core's name for a factor of sine and cosine.
            layer.self_attention._yarn_concentration_factor = rope.get("attention_factor", 1.0)
        return
    compute = {"linear": linear, "llama3": llama3}[rope["rope_type"]]
    frequencies = compute(rope, base, 2 * plain.inv_freq.numel())
    plain.inv_freq = frequencies.to(plain.inv_freq.device)


def linear(rope: Mapping[str, Any], base: float, dim: int) -> torch.Tensor:
    """Inverse frequencies, float32 [dim / 2], all divided by one factor."""
    return _plain(base, dim) / rope["factor"]


def dynamic(rope: Mapping[str, Any], base: float, dim: int, length: int) -> torch.Tensor:
    """Inverse frequencies of a text of ``length`` tokens: a larger base for a longer one."""
    original, factor = rope["original_max_position_embeddings"], rope["factor"]
    longest = torch.tensor(max(length, int(original)))
    grown = (factor * longest / original) - (factor - 1)
    return _plain(base * grown ** (dim / (dim - 2)), dim)


def longrope(rope: Mapping[str, Any], base: float, dim: int, length: int) -> torch.Tensor:
    """Inverse frequencies, each divided by a factor of its own, another one in longer texts."""
    is_long = length > rope["original_max_position_embeddings"]
    factors = torch.tensor(rope["long_factor" if is_long else "short_factor"])
    steps = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim
    return 1.0 / (factors * base**steps)


def llama3(rope: Mapping[str, Any], base: float, dim: int) -> torch.Tensor:
    """Inverse frequencies of which the low ones are divided, and those between in part."""
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    original = rope["original_max_position_embeddings"]
    plain = _plain(base, dim)
    wavelength = 2 * math.pi / plain
    share = (original / wavelength - low) / (high - low)
    between = (1 - share) * plain / factor + share * plain
    scaled = torch.where(wavelength > original / low, plain / factor, between)
    return torch.where(wavelength < original / high, plain, scaled)


def _plain(base: float | torch.Tensor, dim: int) -> torch.Tensor:
    steps = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim
    return 1.0 / (base**steps)
