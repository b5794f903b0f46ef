"""How far KL divergence moves by chance alone, when a model is rounded to INT4 or INT8.

    python benchmarks/rounding_spread.py MODEL --calibration chat.jsonl --test held_out.jsonl

Each draw multiplies the channels of every norm before linears by random factors near one and
divides the weights after it by them: in float32 the same model, whose weights fall on other codes.
It is then rounded to nearest, to INT4 (a scale per 128) and to INT8 with calibrated inputs (a scale
a row and one for the inputs), with transformers and PyTorch alone. What a method changes within the
spread of the draws says nothing about the method. ``--smooth ALPHA`` draws the factors around those
of SmoothQuant (Xiao et al., 2022) instead of around one. Rows of the files are conversations with
``messages``.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

GROUP = 128


def linears(model: Any) -> Iterator[tuple[str, nn.Linear]]:
    """All but the output layer."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            yield name, module


def norms(model: Any) -> Iterator[tuple[nn.Parameter, list[nn.Linear]]]:
    """Each norm's weight, and the linears that read its output."""
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        yield layer.input_layernorm.weight, [attention.q_proj, attention.k_proj, attention.v_proj]
        yield layer.post_attention_layernorm.weight, [mlp.gate_proj, mlp.up_proj]


@torch.no_grad()
def largest_inputs(model: Any, texts: list[torch.Tensor]) -> dict[nn.Module, torch.Tensor]:
    """Of each channel of each linear, shape [in]."""
    found: dict[nn.Module, torch.Tensor] = {}

    def look(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        largest = inputs[0].abs().flatten(0, -2).amax(0)
        found[module] = torch.maximum(found.get(module, largest), largest)

    hooks = [module.register_forward_pre_hook(look) for _, module in linears(model)]
    for ids in texts:
        model(ids)
    for hook in hooks:
        hook.remove()
    return found


@torch.no_grad()
def scale(model: Any, factors: Callable[[nn.Parameter, list[nn.Linear]], torch.Tensor]) -> None:
    """Multiply norms by factors, and divide the weights after them by the same."""
    for norm, after in norms(model):
        factor = factors(norm, after)
        norm.mul_(factor)
        for linear in after:
            linear.weight.div_(factor)


@torch.no_grad()
def to_int4(model: Any, _texts: list[torch.Tensor]) -> None:
    for _, linear in linears(model):
        blocks = linear.weight.unflatten(1, (-1, GROUP))
        step = (blocks.abs().amax(-1, keepdim=True) / 7).bfloat16().float()
        linear.weight.copy_(((blocks / step).round().clamp(-8, 7) * step).flatten(1))


@torch.no_grad()
def to_int8(model: Any, texts: list[torch.Tensor]) -> None:
    largest = largest_inputs(model, texts)
    for _, linear in linears(model):
        step = linear.weight.abs().amax(1, keepdim=True) / 127
        linear.weight.copy_((linear.weight / step).round() * step)
        of_inputs = largest[linear].max() / 127
        linear.register_forward_pre_hook(
            lambda _, inputs, s=of_inputs: ((inputs[0] / s).round().clamp(-128, 127) * s,)
        )


@torch.no_grad()
def divergence(model: Any, reference: list[torch.Tensor], texts: list[torch.Tensor]) -> float:
    """Mean over tokens, times 1000."""
    total = 0.0
    for ids, wanted in zip(texts, reference, strict=True):
        found = model(ids).logits[0].log_softmax(-1)
        total += float((wanted.exp() * (wanted - found)).sum())
    return 1000 * total / sum(ids.shape[1] for ids in texts)


class Factors:
    """One draw: near one, or near SmoothQuant's."""

    def __init__(
        self,
        model: Any,
        inputs: list[torch.Tensor],
        draw: int,
        spread: float,
        smooth: float | None,
    ) -> None:
        self.generator = torch.Generator().manual_seed(draw)
        self.spread, self.smooth = spread, smooth
        self.inputs = dict(zip((module for _, module in linears(model)), inputs, strict=True))

    def __call__(self, norm: nn.Parameter, after: list[nn.Linear]) -> torch.Tensor:
        drawn = (self.spread * torch.randn(norm.shape, generator=self.generator)).exp()
        if self.smooth is None:
            return drawn
        weights = torch.cat([each.weight for each in after]).abs().amax(0)
        inputs: torch.Tensor = self.inputs[after[0]]
        return drawn * weights ** (1 - self.smooth) / inputs**self.smooth


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=100, help="of each file")
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--spread", type=float, default=0.02, help="of the factors' logarithms")
    parser.add_argument("--smooth", type=float, metavar="ALPHA")
    args = parser.parse_args()
    tokenizer: Any = AutoTokenizer.from_pretrained(args.model)
    original: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()

    def texts(path: Path) -> list[torch.Tensor]:
        lines = path.read_text(encoding="utf-8").split("\n")[: args.rows]
        rows = [json.loads(line)["messages"] for line in lines if line]
        return [
            torch.tensor([tokenizer.apply_chat_template(row, tokenize=True, return_dict=False)])
            for row in rows
        ]

    calibration, test = texts(args.calibration), texts(args.test)
    with torch.no_grad():
        reference = [original(ids).logits[0].log_softmax(-1) for ids in test]
    inputs = list(largest_inputs(original, calibration).values())
    for kind, quantize in (("INT4", to_int4), ("INT8, calibrated inputs", to_int8)):
        found = []
        for draw in range(args.draws):
            model = copy.deepcopy(original)
            scale(model, Factors(model, inputs, draw, args.spread, args.smooth))
            quantize(model, calibration)
            found.append(divergence(model, reference, test))
        print(
            f"{kind}: mean {statistics.mean(found):.3f}, standard deviation "
            f"{statistics.stdev(found):.3f}, {min(found):.3f} to {max(found):.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
