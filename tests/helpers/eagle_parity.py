"""A pseudo-stage of ``run_stages.py``: losses and gradients of a draft, ours and ModelOpt's."""

from __future__ import annotations

import json
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from post_training.checkpoints import loading
from post_training.checkpoints.source import Source, find_source
from post_training.cli.stage import Stage
from post_training.config.flags import flag
from post_training.config.options import StageOptions


@dataclass(frozen=True, kw_only=True)
class ParityOptions(StageOptions):
    output: Path = flag(help="where the result goes")


@dataclass(frozen=True)
class Plan:
    options: ParityOptions
    source: Source


class Held:
    """A tensor that the graph keeps for the backward pass, for as long as it does."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor


def check(options: ParityOptions) -> Plan:
    return Plan(options, find_source(options))


def eagle_parity(plan: Plan, session: Any) -> None:
    import torch

    from post_training.drafts.eagle3 import loss as draft_loss
    from post_training.drafts.eagle3 import task as eagle_training
    from post_training.drafts.eagle3.algorithm import EAGLE3

    core = loading.load(plan.source, plan.options, session)
    EAGLE3.freeze_target(core)
    eagle_training.set_mode(core)
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 256, (2, 96), generator=generator).to(session.device)
    parameters = [p for p in core.parameters() if p.requires_grad]

    def gradients(loss: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad(loss, parameters))

    def ours(input_ids: torch.Tensor) -> torch.Tensor:
        batch = {"input_ids": input_ids, "loss_mask": torch.ones_like(input_ids)}
        output, loss = eagle_training.forward_step(core, batch)
        return loss(output)[0]

    def modelopts(input_ids: torch.Tensor) -> torch.Tensor:
        """Its last row is compared with what the target says after the last token; ours is not."""
        language_model_loss = core.compute_language_model_loss
        # In float32 it would change the target's logits in place.
        core.compute_language_model_loss = lambda labels, logits: language_model_loss(
            labels, logits.clone()
        )
        labels = torch.cat([input_ids[:, 1:], input_ids[:, :1]], dim=1)
        try:
            core.train()
            return core(input_ids, labels=labels)[:, :-1].sum()
        finally:
            del core.compute_language_model_loss
            eagle_training.set_mode(core)

    def difference(mine: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
        pairs = zip(mine, theirs, strict=True)
        return max(float((a - b).norm() / b.norm()) for a, b in pairs)

    def saved_bytes(length: int) -> int:
        """Memory that the backward pass needs of the forward pass."""
        saved: list[weakref.ref[Held]] = []

        def pack(tensor: torch.Tensor) -> Held:
            held = Held(tensor)
            saved.append(weakref.ref(held))
            return held

        inputs = torch.randint(0, 256, (1, length), generator=generator).to(session.device)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
            loss = ours(inputs)
        kept = [held.tensor.untyped_storage() for held in (each() for each in saved) if held]
        assert loss.requires_grad
        return sum({each.data_ptr(): each.nbytes() for each in kept}.values())

    result = {}
    whole, reference = ours(ids), modelopts(ids)
    result["loss"], result["modelopt"] = float(whole), float(reference)
    whole_gradients = gradients(whole)
    result["gradients"] = difference(whole_gradients, gradients(reference))
    result["saved_bytes"] = [saved_bytes(length) for length in (64, 128, 256)]
    # In chunks, and with the target's logits made anew.
    draft_loss.CHUNK_ELEMENTS, draft_loss.KEPT_BYTES = 2 * 20 * core.vocab_size, 0
    chunked = ours(ids)
    result["chunked"] = float(chunked)
    result["chunked_gradients"] = difference(gradients(chunked), whole_gradients)
    result["chunked_saved_bytes"] = [saved_bytes(length) for length in (64, 128, 256)]
    core.eagle_mix_hidden_states = True
    mixed = ours(ids)
    result["mixed"] = float(mixed)
    result["mixed_is_finite"] = all(bool(g.isfinite().all()) for g in gradients(mixed))
    plan.options.output.write_text(json.dumps(result))


STAGE = Stage("eagle_parity", ParityOptions, check, eagle_parity)
