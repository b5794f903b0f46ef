"""Run by test_prune.py: prune a small random model with experts, and save and load the result.

    python tests/helpers/pruning_worker.py OUTPUT.pt --fp32

No conf has experts yet, so the model is built from its architecture.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from generation_worker import GROUPED_QUERIES, SHARED, VOCABULARY, fill
from whole_logits import prefill_logits

from post_training.cli.stage import open_session
from post_training.common.errors import UsageError
from post_training.config import arguments
from post_training.models.architecture import Architecture
from post_training.models.builder import BuildOptions, build, transformer_config
from post_training.pruning import minitron
from post_training.pruning import search as pruning_search
from post_training.pruning import space as pruning_space

MIXTURE = {
    "num_moe_experts": 8,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 64,
    "moe_shared_expert_intermediate_size": 128,
    # The first layer is dense, as in DeepSeek's models; a list is cut to the kept layers.
    "moe_layer_freq": [0, 1, 1, 1],
}
SIZES = {
    "num_layers": 2,
    "hidden_size": 48,
    "num_moe_experts": 4,
    "moe_ffn_hidden_size": 32,
    "moe_shared_expert_intermediate_size": 64,
}


def main() -> None:
    output = Path(sys.argv[1])
    args = arguments.parse_namespace("worker", lambda parser: None, lambda args: None, sys.argv[2:])
    with open_session(args):
        torch.save(run(output.with_suffix("")), output)


def run(folder: Path) -> dict[str, object]:
    from post_training.checkpoints import torch_dist
    from post_training.common.manifest import Manifest

    original = Architecture(
        transformer={**SHARED, **GROUPED_QUERIES, "qk_layernorm": True, **MIXTURE},
        vocab_size=VOCABULARY,
        max_position_embeddings=256,
    )
    options = BuildOptions(dtype="fp32", layer_spec="transformer_engine")
    steps = pruning_space.Granularity.of(original, {"hidden_size": 16})
    allowed = pruning_space.dimensions(original, steps)
    pruning_space.check_export_config(SIZES, allowed)
    config = transformer_config(original, options)

    def refusal(parameters: float) -> str:
        try:
            search = pruning_search.Search({"params": parameters})
            pruning_search.check_reachable(original, config, allowed, search)
        except UsageError as error:
            return str(error)
        return ""

    model = build(original, options)
    fill(model)
    ids = torch.arange(96).reshape(3, 32) % VOCABULARY
    outcome = minitron.prune(
        model,
        SIZES,
        steps,
        allowed=allowed,
        acceptable=pruning_search.acceptance(original, config, allowed, SIZES),
        calibrate=lambda dynamic: prefill_logits(dynamic, ids),
        describe_calibration=dict,
    )
    after = pruning_space.pruned_architecture(original, outcome.config, outcome.kept_layers)
    logits = prefill_logits(model, ids)
    computed = pruning_search.size(after, model.config, pruning_search.Memory())
    counted = pruning_search.counted(model, computed)
    torch_dist.save(model, folder, Manifest("prune", after.to_json()))
    # As every later stage loads it: with ModelOpt's layer spec, from the architecture alone.
    loaded = build(after, BuildOptions(dtype="fp32"))
    torch_dist.load(loaded, folder)
    return {
        "too small": refusal(1e3),
        "too large": refusal(1e9),
        "kept_layers": outcome.kept_layers,
        "pattern": after.transformer["moe_layer_freq"],
        "computed": (computed.parameters, computed.active),
        "counted": counted.parameters,
        "logits": logits,
        "loaded": prefill_logits(loaded, ids),
        "experts": len(loaded.decoder.layers[-1].mlp.experts.local_experts),
    }


if __name__ == "__main__":
    main()
