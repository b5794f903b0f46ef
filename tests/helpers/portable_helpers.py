"""What the tests of ``post_training.portable`` share. Import it before megatron-core.

Importing this module installs the stand-ins.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from post_training import portable

REPORT = portable.install()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROOT = Path(__file__).parents[2]
VOCABULARY = 256
SPECS = ("modelopt", "transformer_engine")


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal values on the device under test, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def tokens(batch: int = 2, length: int = 24, seed: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (batch, length), generator=generator).to(DEVICE)


@contextmanager
def process_group(folder: Path, **sizes: int) -> Iterator[None]:
    """One process with megatron-core's groups initialised."""
    backend = "nccl" if DEVICE.type == "cuda" else "gloo"
    torch.distributed.init_process_group(
        backend, init_method=f"file://{folder / 'rendezvous'}", rank=0, world_size=1
    )
    try:
        with model_parallel(**sizes):
            yield
    finally:
        torch.distributed.destroy_process_group()


@contextmanager
def model_parallel(tensor: int = 1, pipeline: int = 1, expert: int = 1) -> Iterator[None]:
    """megatron-core's groups of these sizes, and its seeds."""
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel(
        tensor, pipeline, expert_model_parallel_size=expert, expert_tensor_parallel_size=1
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()


def save_tiny_qwen3(folder: Path, experts: int = 0) -> Path:
    """A random Qwen3 (or Qwen3-MoE) checkpoint with norms that differ from one."""
    import transformers

    shared: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "initializer_range": 0.1,
    }
    torch.manual_seed(0)
    model: Any
    if experts:
        config = transformers.Qwen3MoeConfig(
            num_experts=experts,
            num_experts_per_tok=2,
            moe_intermediate_size=64,
            norm_topk_prob=True,
            **shared,
        )
        model = transformers.Qwen3MoeForCausalLM(config)
    else:
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**shared))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def original_logits(folder: Path, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[b, s, vocabulary] from ``transformers``."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    with torch.no_grad():
        return model.to(ids.device).eval()(ids).logits


def build_gpt(
    folder: Path | None,
    spec: str,
    dtype: torch.dtype = torch.float32,
    sequence_parallel: bool = False,
    experts: int = 0,
    grouped: bool = False,
    gather: bool = True,
) -> Any:
    """The mcore model of :func:`save_tiny_qwen3` with its weights, none for ``folder=None``."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_with_transformer_engine_spec,
    )
    from megatron.core.post_training.modelopt.gpt.model_specs import get_gpt_modelopt_spec
    from megatron.core.transformer import TransformerConfig
    from modelopt.torch.export import import_mcore_gpt_from_hf

    mixture: dict[str, Any] = {}
    if experts:
        mixture = {
            "num_moe_experts": experts,
            "moe_router_topk": 2,
            "moe_ffn_hidden_size": 64,
            "moe_grouped_gemm": grouped,
            "moe_token_dispatcher_type": "alltoall",
            "moe_router_load_balancing_type": "none",
            "moe_router_dtype": "fp32",
            "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
            "expert_tensor_parallel_size": 1,
        }
    config = TransformerConfig(
        num_layers=2,
        hidden_size=64,
        ffn_hidden_size=128,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=16,
        normalization="RMSNorm",
        qk_layernorm=True,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        layernorm_epsilon=1e-6,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=DEVICE.type == "cpu",
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        sequence_parallel=sequence_parallel,
        apply_rope_fusion=False,
        bias_activation_fusion=False,
        **mixture,
    )
    if spec == "modelopt":
        layers = get_gpt_modelopt_spec(config, remap_te_layernorm=True)
    else:
        layers = get_gpt_layer_with_transformer_engine_spec(
            num_experts=experts or None, moe_grouped_gemm=grouped, qk_layernorm=True
        )
    model = GPTModel(
        config,
        layers,
        VOCABULARY,
        128,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        rotary_base=rope_theta(folder) if folder else 10000,
        parallel_output=not gather,
    )
    if folder is not None:
        import_mcore_gpt_from_hf(model, str(folder), dtype=dtype)
    return model.to(DEVICE).eval()


def rope_theta(folder: Path) -> float:
    import json

    config = json.loads((folder / "config.json").read_text())
    return config.get("rope_theta") or config["rope_parameters"]["rope_theta"]


def megatron_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """[b, s, vocabulary] of a model on one pipeline stage."""
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    return model(ids, positions, None)


def run_ranks(folder: Path, world: int = 2) -> dict[str, Any]:
    """Run ``portable_ranks.py`` in ``world`` processes on the CPU with gloo; its results by name.

    On the CPU also where there is a GPU: the tests then need one GPU, not several.
    """
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.getenv("PYTHONPATH")])]),
        "WORLD_SIZE": str(world),
    }
    script = Path(__file__).with_name("portable_ranks.py")
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(folder)],
            env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, output in zip(ranks, outputs, strict=True):
        if rank.returncode:
            raise RuntimeError(f"a rank ended with {rank.returncode}:\n{output[-6000:]}")
    return torch.load(folder / "results.pt", weights_only=True)
