"""Logits and generated tokens in bfloat16, ours and those of transformers, beside float32.

Both round every activation to 8 bits of mantissa, after other orders of additions; where the places
of rounding are as many, ours are as far from float32 as theirs, and the two at most twice as far
from each other. How far that is differs by family: a norm after attention enlarges roundings, and
a router sends a token near a tie to another expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tools
import torch

NEW_TOKENS = 8


@dataclass(frozen=True)
class Rounding:
    """Euclidean norms, relative to the logits.

    Attributes:
        theirs: of what transformers' logits differ from float32's.
        ours: the same of ours.
        between: of the difference between the two.
        below: by how much, in standard deviations of logits, the worst token that was generated
            with the cache is below the best one in float32.
    """

    theirs: float
    ours: float
    between: float
    below: float

    def is_alike(self, ratio: float) -> bool:
        near = self.between < 2 * self.theirs and self.below < 4 * self.theirs
        return near and self.ours < ratio * self.theirs


def measure(
    folder: Path, names: Sequence[str], device: str = "cpu"
) -> tuple[dict[str, Rounding], str]:
    """By name of a family or of ``tools.ROTARY``, and what the stages printed."""
    jobs, references, ids = [], {}, tools.tokens()
    for name in names:
        references[name] = tools.random_model(folder / name, name, torch.bfloat16, scale=0.25)
        source = ("--pretrained-model-path", folder / name, "--new-tokens", NEW_TOKENS)
        jobs.append(tools.logits_job(folder / f"{name}_logits", ids, *source))
    done = tools.run_stages(*jobs)
    models = references.items()
    found = {name: _of(folder / f"{name}_logits", model, device) for name, model in models}
    return found, done.stdout + done.stderr


def _of(work: Path, model: torch.nn.Module, device: str) -> Rounding:
    ids, ours = tools.tokens(), tools.read_logits(work)
    theirs = tools.transformers_logits(model.to(device), ids.to(device)).cpu()
    model = model.cpu().float()
    exact = tools.transformers_logits(model, ids)

    def far(one: torch.Tensor, other: torch.Tensor) -> float:
        return ((one - other).norm() / exact.norm()).item()

    new = torch.tensor(tools.read_tokens(work))
    logits = tools.transformers_logits(model, torch.cat([ids, new], dim=1))
    logits = logits[:, ids.shape[1] - 1 : -1]
    chosen = logits.gather(-1, new.unsqueeze(-1)).squeeze(-1)
    below = ((logits.amax(-1) - chosen).max() / logits.std()).item()
    return Rounding(far(theirs, exact), far(ours, exact), far(ours, theirs), below)
