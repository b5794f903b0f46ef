"""Run by ``portable_helpers.run_ranks`` on each of two ranks: everything that needs two.

Writes ``results.pt``: by name, the largest relative difference over both ranks.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import portable_helpers as helpers
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812

LAYOUTS = {"sequence whole": False, "sequence parallel": True}


def main() -> None:
    folder = Path(sys.argv[1])
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world
    )
    results: dict[str, float] = {}
    for layout, sequence_parallel in LAYOUTS.items():
        for kind in ("linear", "norm linear"):
            results.update(compare_linears(kind, layout, sequence_parallel))
    results.update(compare_models(folder))
    results.update(compare_mixtures(folder))
    gathered: list[Any] = [None] * world
    dist.all_gather_object(gathered, results)
    if rank == 0:
        worst = {name: max(each[name] for each in gathered) for name in results}
        torch.save(worst, folder / "results.pt")
    dist.destroy_process_group()


def difference(mine: torch.Tensor | None, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest expected value."""
    assert mine is not None
    assert mine.shape == expected.shape, (mine.shape, expected.shape)
    return ((mine - expected).abs().max() / expected.abs().max()).item()


def part(tensor: torch.Tensor, dimension: int) -> torch.Tensor:
    """This rank's part of a tensor that all ranks have."""
    return tensor.chunk(dist.get_world_size(), dim=dimension)[dist.get_rank()]


def compare_linears(kind: str, layout: str, sequence_parallel: bool) -> dict[str, float]:
    """A column-parallel layer followed by a row-parallel one, against plain torch on one rank."""
    import transformer_engine.pytorch as te

    inp = helpers.random(6, 2, 8, seed=1).requires_grad_()
    gain, up, down = (helpers.random(*s, seed=i) for i, s in enumerate([(8,), (12, 8), (8, 12)]))
    up_bias, down_bias = helpers.random(12, seed=5), helpers.random(8, seed=6)
    for each in (gain, up, down, up_bias, down_bias):
        each.requires_grad_()
    normed = inp
    if kind == "norm linear":
        normed = F.rms_norm(inp, (8,), gain, 1e-5)
    expected = F.linear(F.gelu(F.linear(normed, up, up_bias)), down, down_bias)
    upstream = helpers.random(6, 2, 8, seed=9)
    expected.backward(upstream)

    common: dict[str, Any] = {"sequence_parallel": sequence_parallel, "tp_group": dist.group.WORLD}
    if kind == "linear":
        first: Any = te.Linear(8, 12, parallel_mode="column", **common)
    else:
        first = te.LayerNormLinear(8, 12, normalization="RMSNorm", parallel_mode="column", **common)
    second = te.Linear(12, 8, parallel_mode="row", **common)
    with torch.no_grad():
        first.weight.copy_(part(up, 0))
        first.bias.copy_(part(up_bias, 0))
        second.weight.copy_(part(down, 1))
        second.bias.copy_(down_bias)
        if kind == "norm linear":
            first.layer_norm_weight.copy_(gain)
    mine = inp.detach()
    if sequence_parallel:
        mine, upstream, expected = part(mine, 0), part(upstream, 0), part(expected, 0)
    mine = mine.clone().requires_grad_()
    out = second(F.gelu(first(mine)))
    out.backward(upstream)
    bias_gradient = second.bias.grad
    gain_gradient = first.layer_norm_weight.grad if kind == "norm linear" else None
    if sequence_parallel:
        # Each rank saw its tokens: megatron-core sums gradients of parameters marked so.
        assert second.bias.sequence_parallel
        dist.all_reduce(bias_gradient)
        if gain_gradient is not None:
            assert first.layer_norm_weight.sequence_parallel
            dist.all_reduce(gain_gradient)
    assert inp.grad is not None
    inp_gradient = part(inp.grad, 0) if sequence_parallel else inp.grad
    found = {
        "output": difference(out, expected),
        "input gradient": difference(mine.grad, inp_gradient),
        "column weight gradient": difference(first.weight.grad, part(up.grad, 0)),
        "column bias gradient": difference(first.bias.grad, part(up_bias.grad, 0)),
        "row weight gradient": difference(second.weight.grad, part(down.grad, 1)),
        "row bias gradient": difference(bias_gradient, down_bias.grad),
    }
    if gain_gradient is not None:
        found["norm gradient"] = difference(gain_gradient, gain.grad)
    return {f"{kind}, {layout}: {name}": value for name, value in found.items()}


def gradients(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of the mean loss of predicting the next token, by parameter name."""
    labels = ids.roll(-1, dims=1)
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    model.train()
    model(ids, positions, None, labels=labels).mean().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def shard(name: str, full: torch.Tensor) -> torch.Tensor:
    """This rank's part of a gradient of the whole model."""
    if "linear_fc1.weight" in name:
        gate, up = full.chunk(2)
        return torch.cat([part(gate, 0), part(up, 0)])
    if "linear_fc2.weight" in name or "linear_proj.weight" in name:
        return part(full, 1)
    if "layer_norm" in name or "layernorm" in name:
        return full
    return part(full, 0)


@torch.no_grad()
def two_stage_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """[b, s, vocabulary] on both ranks, of a model that is split over them."""
    hidden = torch.empty(ids.shape[1], ids.shape[0], model.config.hidden_size)
    logits = torch.empty(*ids.shape, helpers.VOCABULARY)
    if dist.get_rank() == 0:
        dist.send(helpers.megatron_logits(model, ids), 1)
    else:
        dist.recv(hidden, 0)
        model.set_input_tensor(hidden)
        logits = helpers.megatron_logits(model, ids)
    dist.broadcast(logits, 1)
    return logits


def compare_models(folder: Path) -> dict[str, float]:
    """GPT models at TP=2 and PP=2: logits against transformers, gradients against TP=1."""
    source = folder / "qwen3"
    ids = helpers.tokens()
    expected = helpers.original_logits(source, ids, torch.float32)
    results = {}
    for spec in helpers.SPECS:
        with helpers.model_parallel():
            whole = gradients(helpers.build_gpt(source, spec, gather=False), ids)
        for layout, sequence_parallel in LAYOUTS.items():
            with helpers.model_parallel(tensor=2):
                model = helpers.build_gpt(source, spec, sequence_parallel=sequence_parallel)
                with torch.no_grad():
                    logits = helpers.megatron_logits(model, ids)
                results[f"{spec}, TP=2, {layout}: logits"] = difference(logits, expected)
                model = helpers.build_gpt(
                    source, spec, sequence_parallel=sequence_parallel, gather=False
                )
                found = gradients(model, ids)
                parameters = dict(model.named_parameters())
                worst = 0.0
                for name, gradient in found.items():
                    shared = getattr(parameters[name], "sequence_parallel", False)
                    if shared or "q_layernorm" in name or "k_layernorm" in name:
                        dist.all_reduce(gradient)
                    worst = max(worst, difference(gradient, shard(name, whole[name])))
                results[f"{spec}, TP=2, {layout}: gradients"] = worst
        with helpers.model_parallel(pipeline=2):
            logits = two_stage_logits(helpers.build_gpt(source, spec), ids)
            results[f"{spec}, PP=2: logits"] = difference(logits, expected)
    return results


def compare_mixtures(folder: Path) -> dict[str, float]:
    """A mixture of experts at EP=2, and at TP=2, against transformers."""
    source = folder / "qwen3-moe"
    ids = helpers.tokens()
    expected = helpers.original_logits(source, ids, torch.float32)
    results = {}
    for name, sizes in {"EP=2": {"expert": 2}, "TP=2, EP=2": {"tensor": 2, "expert": 2}}.items():
        with helpers.model_parallel(**sizes):
            model = helpers.build_gpt(
                source, "modelopt", experts=4, sequence_parallel="tensor" in sizes
            )
            with torch.no_grad():
                results[f"mixture, {name}: logits"] = difference(
                    helpers.megatron_logits(model, ids), expected
                )
    return results


if __name__ == "__main__":
    main()
