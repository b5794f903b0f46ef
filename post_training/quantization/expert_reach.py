"""Calibration tokens for experts that the router did not choose.

The layer's own pass stays as it is, so later layers get what they get in the plain model. After it,
its tokens go to further experts, as many at a time as the router chooses, so that no pass takes
more memory than the layer's own; what those experts give is dropped. No expert gets a token twice,
so sums over tokens, such as GPTQ's, weigh each once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer

from post_training.quantization import expert_options, experts

_SCORES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda logits: torch.nn.functional.softplus(logits).sqrt(),
}


@contextlib.contextmanager
def reaching(
    model: torch.nn.Module, share: float, added: experts.ExpertTokens
) -> Iterator[dict[int, torch.Tensor]]:
    """Let each token reach a share of the experts in the block; its end is a collective call.

    Within it this rank's further tokens are in what it yields, whose tensors do not change.

    Args:
        share: of a layer's experts; 0 leaves everything to the router.
        added: the tokens that experts get beyond the router's are added to it.
    """
    sent: dict[int, torch.Tensor] = {}
    found = [m for m in model.modules() if isinstance(m, MoELayer) and share]
    layers = [_Layer(each, share, sent) for each in found]
    with contextlib.ExitStack() as stack:
        for each in layers:
            stack.callback(each.layer.router.register_forward_hook(each.keep).remove)
            hook = each.layer.register_forward_hook(each.send, with_kwargs=True)
            stack.callback(hook.remove)
        yield sent
    if share:
        experts.add(added, sent)


class _Layer:
    """The hooks of one layer with experts.

    Attributes:
        sent: tokens by expert, int64 [experts], under the layer's number.
    """

    def __init__(self, layer: Any, share: float, sent: dict[int, torch.Tensor]) -> None:
        self.layer, self.router = layer, layer.router
        self.number: int = layer.router.layer_number - 1
        self.chosen_by_router: int = layer.router.topk
        total = layer.config.num_moe_experts
        reached = expert_options.reached(share, total, self.chosen_by_router)
        self.further = reached - self.chosen_by_router
        self.sent = sent
        device = layer.router.weight.device
        sent[self.number] = torch.zeros(total, dtype=torch.int64, device=device)
        self.own: tuple[torch.Tensor, torch.Tensor] | None = None

    def keep(self, _router: Any, _given: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        """A forward hook of the router: probabilities and choice, [tokens, experts] each."""
        self.own = output

    @torch.no_grad()
    def send(self, _layer: Any, given: tuple[Any, ...], kwargs: Any, _output: Any) -> None:
        """A forward hook of the layer: its tokens [s, b, h] go to further experts."""
        if self.own is None or not self.further:
            return
        (probabilities, chosen), self.own = self.own, None
        hidden = given[0] if given else kwargs["hidden_states"]
        logits = self.router.gating(hidden).flatten(0, -2).float()
        scores = _SCORES[self.router.score_function](logits)
        # What the input of an expert is multiplied by, where a family does that.
        weights = scores * (self.layer.config.moe_router_topk_scaling_factor or 1.0)
        weights = weights.to(probabilities.dtype)
        if self.router.expert_bias is not None:
            scores = scores + self.router.expert_bias
        best = scores.masked_fill(chosen, -torch.inf).topk(self.further).indices
        for some in best.split(self.chosen_by_router, dim=1):
            reached = torch.zeros_like(chosen).scatter_(1, some, True)
            self._run(hidden, weights * reached, reached)
            self.sent[self.number] = self.sent[self.number] + reached.sum(0)

    def _run(self, hidden: torch.Tensor, weights: torch.Tensor, reached: torch.Tensor) -> None:
        """The layer's experts on the tokens that are sent to them; shared ones are left out."""
        layer, config = self.layer, self.layer.config
        # A dispatcher takes it for the number of experts of each token.
        before, config.moe_router_topk = config.moe_router_topk, int(reached[0].sum())
        try:
            tokens, weights = layer.preprocess(hidden, weights, reached)
            layer.routed_experts_compute(*layer.dispatch(tokens, weights))
        finally:
            config.moe_router_topk = before
