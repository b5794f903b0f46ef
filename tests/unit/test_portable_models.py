"""Whole mcore models on the stand-ins: logits, quantization, checkpoints of quantizer state."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import portable_helpers as helpers
import pytest
import torch


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a tiny Qwen3 checkpoint; process groups are up while it is used."""
    folder = tmp_path_factory.mktemp("models")
    with helpers.process_group(folder):
        yield helpers.save_tiny_qwen3(folder / "qwen3")


def relative(mine: torch.Tensor, expected: torch.Tensor) -> float:
    return ((mine.float() - expected.float()).abs().max() / expected.float().abs().max()).item()


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return helpers.megatron_logits(model, ids)


@pytest.mark.parametrize("spec", helpers.SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_equal_those_of_transformers(source, spec, dtype):
    ids = helpers.tokens()
    mine = logits(helpers.build_gpt(source, spec, dtype), ids)
    expected = helpers.original_logits(source, ids, dtype)
    if helpers.DEVICE.type == "cpu":
        # The same operations in the same order: not one bit differs.
        assert torch.equal(mine, expected)
    else:
        assert relative(mine, expected) < (1e-4 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("spec", helpers.SPECS)
def test_steps_with_a_cache_of_keys_give_the_logits_of_the_whole_sequence(source, spec):
    from megatron.core.inference.contexts import StaticInferenceContext

    model = helpers.build_gpt(source, spec)
    ids = helpers.tokens(length=12)
    whole = logits(model, ids)
    context = StaticInferenceContext(max_batch_size=2, max_sequence_length=12)
    positions = torch.arange(12, device=ids.device).expand_as(ids)
    steps = []
    with torch.no_grad():
        for start, stop in [(0, 8), *((i, i + 1) for i in range(8, 12))]:
            part = slice(start, stop)
            out = model(ids[:, part], positions[:, part], None, inference_context=context)
            context.increment_sequence_len_offset(stop - start)
            steps.append(out[:, -1])
    expected = whole[:, 7:]
    assert relative(torch.stack(steps, dim=1), expected) < 1e-4


def quantize(model: Any, format_name: str, ids: torch.Tensor) -> Any:
    import modelopt.torch.quantization as mtq

    recipe = copy.deepcopy(getattr(mtq, f"{format_name}_DEFAULT_CFG"))
    keys_and_values = copy.deepcopy(getattr(mtq, f"{format_name}_KV_CFG"))
    recipe["quant_cfg"] = recipe["quant_cfg"] + keys_and_values["quant_cfg"]
    return mtq.quantize(model, recipe, lambda each: logits(each, ids))


@pytest.mark.parametrize("format_name", ["FP8", "NVFP4"])
@pytest.mark.parametrize("spec", helpers.SPECS)
def test_quantized_models_run_and_come_back_from_a_sharded_checkpoint(
    source, spec, format_name, tmp_path
):
    from megatron.core import dist_checkpointing, parallel_state
    from modelopt.torch.opt.plugins import (
        restore_sharded_modelopt_state,
        save_sharded_modelopt_state,
    )

    ids = helpers.tokens()
    model = helpers.build_gpt(source, spec, torch.bfloat16)
    before = logits(model, ids)
    quantize(model, format_name, ids)
    expected = logits(model, ids)
    # Noise of the format, on random weights: there, and not larger than it should be.
    assert 1e-3 < relative(expected, before) < (0.2 if format_name == "FP8" else 0.8)
    layer = model.decoder.layers[0]
    for linear in (layer.self_attention.linear_qkv, layer.mlp.linear_fc2):
        assert linear.weight_quantizer.is_enabled
        assert linear.input_quantizer.amax > 0
    cache = layer.self_attention.core_attention.k_bmm_quantizer
    assert cache.is_enabled

    (tmp_path / "checkpoint").mkdir()
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    dist_checkpointing.save(
        model.sharded_state_dict(metadata=metadata), str(tmp_path / "checkpoint")
    )
    save_sharded_modelopt_state([model], str(tmp_path / "checkpoint"))

    again = helpers.build_gpt(None, spec, torch.bfloat16)
    restore_sharded_modelopt_state([again], str(tmp_path / "checkpoint"))
    loaded = dist_checkpointing.load(
        again.sharded_state_dict(metadata=metadata), str(tmp_path / "checkpoint")
    )
    again.load_state_dict(loaded)
    restored = again.decoder.layers[0].self_attention.core_attention.k_bmm_quantizer
    assert restored.is_enabled
    assert torch.equal(restored.amax, cache.amax)
    assert torch.equal(logits(again, ids), expected)


@pytest.mark.parametrize("grouped", [False, True], ids=["sequential", "grouped"])
def test_a_mixture_of_experts_trains(source, grouped):
    model = helpers.build_gpt(None, "transformer_engine", experts=4, grouped=grouped, gather=False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.1)
    ids = helpers.tokens()
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    model.train()
    loss = model(ids, positions, None, labels=ids).mean()
    loss.backward()
    experts = [n for n, p in model.named_parameters() if "experts" in n]
    assert experts
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert any(
        p.grad is not None and p.grad.abs().sum() > 0
        for n, p in model.named_parameters()
        if n in experts
    )


@pytest.mark.parametrize("distributed", [False, True], ids=["whole", "distributed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_megatrons_optimizer_and_schedule_lower_the_loss(source, dtype, distributed):
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func

    ids = helpers.tokens()
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    model = helpers.build_gpt(source, "transformer_engine", dtype, gather=False).train()
    parallel = DistributedDataParallel(
        model.config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=distributed
        ),
        model,
    )
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=1e-3,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=distributed,
            clip_grad=1.0,
        ),
        [parallel],
    )
    model.config.finalize_model_grads_func = finalize_model_grads

    def step(iterator, chunk):
        loss = chunk(ids, positions, None, labels=ids.roll(-1, dims=1))
        return loss, lambda out: (out.mean(), {"loss": out.mean().item()})

    losses = []
    for _ in range(4):
        parallel.zero_grad_buffer()
        optimizer.zero_grad()
        result = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iter([]),
            model=[parallel],
            num_microbatches=1,
            seq_length=ids.shape[1],
            micro_batch_size=ids.shape[0],
            forward_only=False,
        )
        successful, norm, _ = optimizer.step()
        assert successful
        assert norm > 0
        losses.append(result[0]["loss"])
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.9 * losses[0]


def test_a_model_with_fewer_heads_after_pruning_runs(source):
    import modelopt.torch.prune as mtp

    ids = helpers.tokens()
    model = helpers.build_gpt(source, "transformer_engine")
    divisors = {"hidden_size_divisor": 16, "ffn_hidden_size_divisor": 16}
    mode = ("mcore_minitron", mtp.mcore_minitron.get_mcore_minitron_config(**divisors))
    sizes = {"hidden_size": 48, "ffn_hidden_size": 64, "num_attention_heads": 2}
    model, _ = mtp.prune(
        model,
        mode=[mode],
        constraints={"export_config": sizes},
        dummy_input=None,
        config={"forward_loop": lambda each: logits(each, ids)},
    )
    assert model.decoder.layers[0].self_attention.core_attention.num_attention_heads == 2
    assert model.decoder.layers[0].mlp.linear_fc2.weight.shape == (48, 64)
    assert logits(model, ids).isfinite().all()
