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
from post_training.config.options import StageOptions
from post_training.models.architecture import Architecture
from post_training.models.builder import BuildOptions, build, transformer_config
from post_training.pruning.options import Memory, SizeSearch
from post_training.pruning.space import PruningSpace, check_sizes, pruned_architecture

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
    with open_session(arguments.parse("worker", StageOptions, sys.argv[2:])):
        torch.save(run(output.with_suffix("")), output)


def run(folder: Path) -> dict[str, object]:
    from post_training.checkpoints import torch_dist
    from post_training.common.manifest import Manifest

    # It needs Transformer Engine, for which the session may have put a stand-in in place.
    from post_training.pruning import minitron, search

    original = Architecture(
        transformer={**SHARED, **GROUPED_QUERIES, "qk_layernorm": True, **MIXTURE},
        vocab_size=VOCABULARY,
        max_position_embeddings=256,
    )
    options = BuildOptions(dtype="fp32", layer_spec="transformer_engine")
    space = PruningSpace.of(original, {"hidden_size": 16})
    allowed = space.dimensions
    sizes = check_sizes(SIZES, allowed)
    config = transformer_config(original, options)

    def refusal(parameters: float) -> str:
        try:
            wanted = SizeSearch({"params": parameters})
            search.check_reachable(original, config, allowed, wanted)
        except UsageError as error:
            return str(error)
        return ""

    model = build(original, options)
    fill(model)
    ids = torch.arange(96).reshape(3, 32) % VOCABULARY
    result = minitron.prune(
        model,
        sizes,
        space,
        acceptable=search.acceptance(original, config, allowed, sizes),
        calibrate=lambda dynamic: prefill_logits(dynamic, ids),
        describe_calibration=dict,
    )
    after = pruned_architecture(original, result.config, result.kept_layers)
    logits = prefill_logits(model, ids)
    computed = search.size(after, model.config, Memory())
    counted = search.counted(model, computed)
    torch_dist.save(model, folder, Manifest("prune", after.to_json()))
    # As every later stage loads it: with ModelOpt's layer spec, from the architecture alone.
    loaded = build(after, BuildOptions(dtype="fp32"))
    torch_dist.load(loaded, folder)
    return {
        "too small": refusal(1e3),
        "too large": refusal(1e9),
        "kept_layers": result.kept_layers,
        "pattern": after.transformer["moe_layer_freq"],
        "computed": (computed.parameters, computed.active_parameters),
        "counted": counted.parameters,
        "logits": logits,
        "loaded": prefill_logits(loaded, ids),
        "experts": len(loaded.decoder.layers[-1].mlp.experts.local_experts),
    }


if __name__ == "__main__":
    main()
