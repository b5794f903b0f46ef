"""An EAGLE-3 draft attached to a megatron-core model, by ModelOpt's ``eagle`` mode.

Loading a drafted checkpoint (``loading.load``, at any TP and PP) attaches the draft before the
weights are read, from ModelOpt's state in it. Then

- ``model.eagle_module`` is the draft, on the last pipeline stage, and None on the others;
- ``model.eagle_module.d2t`` maps a draft token ``t`` to the target's ``t + d2t[t]``: int64 [draft
  vocabulary], there only if the draft's vocabulary is smaller than the target's;
- ``model.eagle_config.eagle_aux_hidden_state_layer_ids`` are the auxiliary layers: ``i`` stands
  for the output of the target's layer ``i``, counted from 0;
- layers of the target leave those outputs in a list, which ``forward.auxiliary_states`` hands out
  and empties.

The same without torch is :class:`post_training.drafts.eagle3.draft.Draft`.
"""

from __future__ import annotations

from typing import Any

import modelopt.torch.speculative as mtsp
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from post_training.drafts.eagle3.draft import TARGETS, Draft
from post_training.inference import forward

# An export writes the longest text; ModelOpt has no use for it, and knows the target's sizes.
_NOT_MODELOPTS = (*TARGETS, "max_position_embeddings")


def attach(model: Any, draft: Draft, seed: int) -> None:
    """Attach the draft to this rank's part of a model, changed in place, and initialise it.

    ModelOpt converts every pipeline stage; the draft itself is on the last one. The same seed
    gives the same draft at any layout on the CPU.
    """
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    mtsp.convert(model, [("eagle", _modelopt_config(draft))])
    core = forward.unwrap(model)
    _share_embedding(core)
    if core.eagle_module is not None:
        _initialize(core.eagle_module, draft, seed)
    model.eval()


def _share_embedding(core: Any) -> None:
    """Give the last pipeline stage, where ModelOpt makes an empty one, the first one's embedding.

    A checkpoint has it for both; weights from Hugging Face are read by the first stage only.
    """
    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        return
    if not (core.pre_process or core.post_process):
        return
    group = parallel_state.get_embedding_group()
    first = torch.distributed.get_process_group_ranks(group)[0]
    torch.distributed.broadcast(core.embedding.word_embeddings.weight.data, first, group=group)


def _modelopt_config(draft: Draft) -> dict[str, Any]:
    """ModelOpt's EagleConfig; saved in the checkpoint's ModelOpt state, from which it restores."""
    config = {key: value for key, value in draft.config.items() if key not in _NOT_MODELOPTS}
    return {
        "eagle_offline": draft.offline,
        "eagle_architecture_config": config,
        "eagle_decoder_type": "llama",
        "eagle_freeze_base_model": True,
        "eagle_self_logit_distillation": True,
        "eagle_ttt_steps": draft.ttt_steps,
        "eagle_mix_hidden_states": draft.mix_hidden_states,
        # It prints; accuracies are reported by the training loop.
        "eagle_report_acc": False,
        # An export states the positions that the draft was trained with, nothing else.
        "eagle_export_rope_scaling": {},
    }


def _initialize(module: Any, draft: Draft, seed: int) -> None:
    """Give values to what ModelOpt leaves as it was in memory, and check that nothing is left.

    ``fc`` mixes the auxiliary states into one and is created without an initialisation
    (``megatron_eagle.py``: ``init_method=(lambda w: None)``). All tensor-parallel ranks hold it
    whole, so all draw the same numbers.
    """
    weight = module.fc.weight
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(weight.shape, generator=generator) * draft.config["initializer_range"]
    with torch.no_grad():
        weight.copy_(values)
        if module.fc.bias is not None and module.fc.bias.numel():
            module.fc.bias.zero_()
    for name, parameter in module.named_parameters():
        if not bool(torch.isfinite(parameter).all()) or float(parameter.abs().max()) > 100:
            raise RuntimeError(f"parameter {name} of the draft is not initialised")
