"""The engine that an export is for, and whether it reads what a checkpoint is quantized to.

No torch.
"""

from __future__ import annotations

from post_training.checkpoints.source import Source
from post_training.common.errors import UsageError
from post_training.drafts.eagle3.draft import Draft
from post_training.quantization import kernels
from post_training.quantization.engines import registry as engines

# By --target.
_SERVE = {
    "vllm": "vllm serve",
    "sglang": "python -m sglang.launch_server --model-path",
    "trtllm": "trtllm-serve",
}


def server(target: str, *, simulated: bool) -> str:
    """The command that a model's folder is appended to."""
    return "vllm_serve_fakequant.py" if simulated else _SERVE[target]


def choose(asked: str | None, source: Source) -> str:
    """The engine of ``--target``, or the one that ``quantize`` was told, or the first."""
    recorded = (source.manifest or {}).get("quantization") or {}
    known = recorded.get("target")  # by the version that quantized it
    return asked or (known if known in engines.TARGETS else engines.DEFAULT)


def check(source: Source, target: str) -> None:
    """Refuse a quantized checkpoint that the engine would not read correctly.

    Raises:
        UsageError: naming the format, the reason and what to do.
    """
    recorded = (source.manifest or {}).get("quantization") or {}
    algorithm = engines.stored_as(recorded.get("quant_algo", ""), target)
    reason = recorded.get("reason", "")
    what = f"--load {source.location} --target {target}"
    if recorded.get("exportable") is not False:
        reason = engines.refusal(algorithm, target, recorded.get("kv_cache_quant_algo", ""))
    if reason:
        raise UsageError(
            what,
            f"it is quantized as {recorded.get('format')}, which cannot be exported: {reason}",
            "name another --target, or quantize the model in a format that the engine reads "
            "(bash export.sh --list-formats shows them)",
        )
    if source.described is not None and target != recorded.get("target"):
        left_out = recorded.get("left_out", ())
        kernels.check(what, algorithm, source.described.resolved(), target, left_out=left_out)


def check_draft(draft: Draft | None, source: Source, target: str) -> None:
    """Refuse a draft that reads what the engine does not keep.

    Args:
        draft: None: the checkpoint does not describe it.

    Raises:
        UsageError: naming the layer and what to do.
    """
    engine = engines.TARGETS[target]
    if draft is None or source.described is None or engine.last_layer:
        return
    last = source.described.resolved()["num_layers"] - 1
    if last in draft.aux_hidden_state_layer_ids:
        raise UsageError(
            f"--load {source.location} --target {target}",
            f"the draft reads the output of layer {last}, the last one, and {engine.name} keeps "
            "what enters a layer",
            "name another --target, or train a draft that reads earlier layers "
            "(eagle_aux_hidden_state_layer_ids in --eagle-config)",
        )
