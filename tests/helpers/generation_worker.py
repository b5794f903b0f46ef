"""Run by test_generation.py under torchrun: inference on small random models, at any layout.

    torchrun ... tests/helpers/generation_worker.py OUTPUT.pt --tensor-model-parallel-size 2 --fp32

Rank 0 saves what it found; every rank checks that it holds the same.
"""

from __future__ import annotations

import sys
import zlib
from pathlib import Path
from typing import Any

import torch
from whole_logits import prefill_logits

from post_training.cli.stage import open_session
from post_training.common.errors import UsageError
from post_training.config import arguments
from post_training.config.options import StageOptions
from post_training.data import calibration_data
from post_training.distributed.collectives import on_first_rank
from post_training.inference import generation
from post_training.inference.batching import Batching
from post_training.models.architecture import Architecture
from post_training.models.builder import BuildOptions, build

VOCABULARY = 96
LENGTHS = (5, 11, 8, 1)
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5], [8, 9, 7, 9, 3], [2, 3, 8, 4, 6, 2, 6, 4], [7]]


SHARED = {
    "num_layers": 4,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 4,
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "activation_func": "silu",
    "add_bias_linear": False,
}
GROUPED_QUERIES = {"num_query_groups": 2, "kv_channels": 16}
# Query, key and value sizes of multi-latent attention (DeepSeek).
LATENT = {
    "multi_latent_attention": True,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_head_dim": 16,
    "qk_pos_emb_head_dim": 8,
    "v_head_dim": 16,
    "rope_type": "rope",
    "qk_layernorm": True,
}
MODELS = {
    "tied": {**GROUPED_QUERIES, "qk_layernorm": True},
    "untied": {**GROUPED_QUERIES, "add_qkv_bias": True},
    "latent": LATENT,
}


def architecture(name: str) -> Architecture:
    return Architecture(
        transformer={**SHARED, **MODELS[name]},
        vocab_size=VOCABULARY,
        max_position_embeddings=256,
        rotary_base=10000.0,
        share_embeddings_and_output_weights=name == "tied",
    )


def fill(model: torch.nn.Module) -> None:
    """Random weights that depend on the parameter's name only, not on the parallel layout."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    def each(entry: Any) -> Any:
        if isinstance(entry, dict):
            return [part for value in entry.values() for part in each(value)]
        if isinstance(entry, (list, tuple)):
            return [part for value in entry for part in each(value)]
        if isinstance(entry, ShardedTensorFactory):
            return each(entry.build())
        return [entry] if isinstance(entry, ShardedTensor) else []

    for shard in each(model.sharded_state_dict()):
        if shard.data is None:
            continue
        seed = torch.Generator().manual_seed(zlib.crc32(shard.key.encode()))
        whole = torch.randn(shard.global_shape, generator=seed) * 0.2
        if "norm" in shard.key:
            whole = whole + 1
        with torch.no_grad():
            shard.data.copy_(whole[shard.global_slice()].reshape(shard.data.shape))


def inference(model: torch.nn.Module) -> dict[str, Any]:
    seed = torch.Generator().manual_seed(1)
    input_ids = torch.randint(VOCABULARY, (len(LENGTHS), max(LENGTHS)), generator=seed)
    generate = {"max_new_tokens": 12, "batching": Batching(3, "--generate-batch-size")}
    tokens = generation.generate(model, PROMPTS, **generate)
    prefix = input_ids[0, :3].tolist()
    shared = input_ids.clone()
    shared[:, :3] = input_ids[0, :3]
    lengths = [max(length, 4) for length in LENGTHS]
    return {
        "input_ids": input_ids,
        "all": prefill_logits(model, input_ids),
        "last": generation.last_logits(model, input_ids, LENGTHS),
        "some": generation.last_logits(model, input_ids, LENGTHS, token_ids=[7, 0, 95]),
        "tokens": tokens,
        "tokens_without_cache": generation.generate(model, PROMPTS, use_cache=False, **generate),
        "tokens_alone": [generation.generate(model, [p], max_new_tokens=12)[0] for p in PROMPTS],
        "tokens_until_end": generation.generate(
            model, PROMPTS, eos_ids=[tokens[0][3], tokens[2][5]], **generate
        ),
        "tokens_of_small_vocabulary": generation.generate(model, PROMPTS, vocab_size=9, **generate),
        "whole_prompts": generation.last_logits(model, shared, lengths),
        "after_prefix": generation.last_logits(
            model,
            shared[:, 3:],
            [length - 3 for length in lengths],
            prefix=generation.prefill_prefix(model, prefix),
        ),
        "supports_prefix": generation.supports_prefix(model),
    }


def output_positions(model: torch.nn.Module) -> int:
    """Most positions that the output layer computes for a batch when the last are asked for."""
    seen = [0]
    if model.post_process:
        model.output_layer.register_forward_hook(
            lambda _module, _inputs, output: seen.append(output[0].shape[0])
        )
    generation.last_logits(model, torch.zeros(2, 50, dtype=torch.long), [50, 20])
    return max(seen)


def gradients_after_inference(model: torch.nn.Module) -> bool:
    """Whether a training step still works: inference leaves tensors in mcore's rotary cache."""
    ids = torch.zeros(1, 12, dtype=torch.long, device=next(model.parameters()).device)
    generation.last_logits(model, ids, [12])
    output = model(ids, ids, None)
    output.float().sum().backward()
    return all(parameter.grad is not None for parameter in model.parameters())


def loaded_on_first_rank() -> bool:
    """Whether data and errors of rank 0 reach all ranks, and no other rank loads."""
    first = torch.distributed.get_rank() == 0

    def load() -> calibration_data.CalibrationData:
        if not first:
            raise RuntimeError("only rank 0 may load")
        return calibration_data.CalibrationData(torch.arange(6).view(2, 3), 1, 6, "a.jsonl", 2)

    def fail() -> calibration_data.CalibrationData:
        if not first:
            raise RuntimeError("only rank 0 may load")
        raise UsageError("--data x", "it is empty", "give another")

    same = on_first_rank(load).input_ids.tolist() == [[0, 1, 2], [3, 4, 5]]
    try:
        on_first_rank(fail)
    except UsageError as error:
        return same and error.cause == "it is empty"
    return False


def main() -> None:
    output, *words = sys.argv[1:]
    given = arguments.parse("worker", StageOptions, words)
    with open_session(given) as session:
        options = BuildOptions(dtype=given.precision, local_attention=given.build.local_attention)
        found: dict[str, Any] = {}
        for name in MODELS:
            model = build(architecture(name), options)
            fill(model)
            found[name] = inference(model)
        found["output_positions"] = output_positions(model)
        if session.parallel.pipeline == 1:
            found["gradients"] = gradients_after_inference(model)
        if session.world > 1:
            found["first_rank"] = loaded_on_first_rank()
            results: list[Any] = [None] * session.world
            torch.distributed.all_gather_object(results, found)
            for other in results:
                for name in MODELS:
                    for key, value in found[name].items():
                        torch.testing.assert_close(other[name][key], value, rtol=0, atol=0)
        if session.is_main:
            torch.save(found, Path(output))


if __name__ == "__main__":
    main()
