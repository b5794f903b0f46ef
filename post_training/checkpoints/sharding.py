"""The tensors of a model as megatron-core's ``dist_checkpointing`` saves and loads them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from post_training.checkpoints.unpickling import only_known_classes
from post_training.common.errors import UsageError

if TYPE_CHECKING:
    from megatron.core.transformer import MegatronModule

# Tells loaders how sharded tensors were cut; Megatron-LM reads it back from the checkpoint.
CONTENT = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
# Of the layer that computes gate and up: maxima of rows, of both parts of a double quantizer, and
# scales of packed rows.
_GATE_UP = re.compile(r"linear_fc1\.weight_quantizer\.(\d+\.)?_(amax|scale)$")
# Of the inputs of Mamba layers and gated delta nets, whose parts are divided one by one.
_INPUTS = re.compile(r"(.*)\.(in_proj)\.weight_quantizer\.(\d+\.)?_(amax|scale)$")


def sharded(
    model: MegatronModule, weights: Path | None = None, *, only: str = ""
) -> dict[str, Any]:
    """The sharded tensors of a model by name, cut as in the checkpoint at ``weights``, if given.

    Args:
        only: those of this module: none on a pipeline stage without it.

    Raises:
        UsageError: for maxima that are of use at another tensor-parallel size only.
    """
    content = metadata(weights)
    there = stored(weights) if weights is not None else None
    module, prefix = model, ""
    if only:
        module, prefix = getattr(model, only, None), f"{only}."
        if module is None:
            return {}
        # ModelOpt (opt/plugins/megatron.py) saves the MLPs of a quantized model, and of modules
        # after them, in two tensors each: a module's are cut as the checkpoint has them.
        halves = [n for n in there or () if n.startswith(prefix) and n.endswith("_w")]
        content["singleton_local_shards"] = bool(halves)
    found = dict(module.sharded_state_dict(prefix=prefix, metadata=content))
    for name, tensor in found.items():
        is_gated = getattr(model.config, "gated_linear_unit", False)
        if is_gated and _GATE_UP.search(name) and max(tensor.local_shape[:1], default=0) > 1:
            found[name] = _in_halves(tensor, there)
        elif (match := _INPUTS.fullmatch(name)) and max(tensor.local_shape[:1], default=0) > 1:
            parts = module.get_submodule(match[1].removeprefix(prefix)).row_parts(match[2])
            found[name] = _in_parts(tensor, parts, there)
    return found


def _in_halves(tensor: Any, there: Mapping[str, Any] | None) -> Any:
    """The maxima or scales of a rank's gate and up, cut like the weights: all of gate, then of up.

    ModelOpt's pattern for them (quantization/plugins/megatron.py, ``_QuantMegatronMLP``) matches no
    name: it saves each rank's gate and up together, which another tensor-parallel size reads as the
    maxima of other rows. Earlier checkpoints are read as they are, at the size of their saving.
    """
    from megatron.core.transformer.mlp import apply_swiglu_sharded_factory

    if _is_whole(tensor, f"{tensor.key}_w", there):
        return tensor
    above = tensor.prepend_axis_num
    places = zip(range(above), tensor.global_offset, tensor.axis_fragmentations, strict=False)
    return apply_swiglu_sharded_factory(tensor, tuple(places), singleton_local_shards=True)


def _in_parts(tensor: Any, parts: Mapping[str, int], there: Mapping[str, Any] | None) -> Any:
    """The maxima or scales of a linear whose weights megatron-core cuts into ``parts`` of rows.

    One may belong to a row, to some blocks of one or to several rows.
    """
    from megatron.core.ssm.utils import _split_tensor_factory

    share = Fraction(tensor.local_shape[0], sum(parts.values()))
    sizes = [share * rows for rows in parts.values()]
    is_of_rows = all(size.denominator == 1 for size in sizes)
    if not is_of_rows or _is_whole(tensor, f"{tensor.key}.{next(iter(parts))}", there):
        return tensor
    return _split_tensor_factory(tensor, [int(size) for size in sizes], list(parts), 0)


def _is_whole(tensor: Any, first: str, there: Mapping[str, Any] | None) -> bool:
    """Whether an earlier checkpoint has a tensor in one piece, and not ``first`` and others.

    UsageError if it cannot be read so.
    """
    if there is None or first in there:
        return False
    chunks = there[tensor.key].chunks if tensor.key in there else []
    if any(chunk.sizes[tensor.prepend_axis_num] != tensor.local_shape[0] for chunk in chunks):
        raise UsageError(
            f"the checkpoint's {tensor.key}",
            "an earlier version saved it in an order that only its own TP reads",
            "set TP as it was for quantize.sh, or quantize the model again",
        )
    return True


def keep_dtypes(model: MegatronModule, weights: Path) -> None:
    """Give the maxima of weights the dtype in which they were saved.

    ModelOpt (quantization/plugins/megatron.py) makes those of a channel anew, in the weights'
    dtype: a maximum saved in float32 would be rounded while it is loaded, and its scale with it.
    """
    there = stored(weights)
    for name, tensor in model.sharded_state_dict(metadata=metadata(weights)).items():
        key = getattr(tensor, "key", "")
        names = (key, f"{key}_w", f"{key}.query", f"{key}.z")  # whole, or the first part
        found: Any = next((there[each] for each in names if each in there), None)
        dtype = found.properties.dtype if hasattr(found, "properties") else None
        if name.endswith("weight_quantizer._amax") and dtype not in (None, tensor.dtype):
            quantizer = model.get_submodule(name.rpartition(".")[0])
            quantizer._amax = quantizer._amax.to(dtype)


def stored(weights: Path) -> dict[str, Any]:
    """What the checkpoint's metadata say of each of its tensors, by name."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    with only_known_classes(f"checkpoint {weights}"):
        return dict(FileSystemReader(str(weights)).read_metadata().state_dict_metadata)


def metadata(weights: Path | None = None) -> dict[str, Any]:
    """How sharded tensors are cut: in a new checkpoint, or in the one at ``weights``."""
    from megatron.core import dist_checkpointing, parallel_state

    content = dict(CONTENT)
    if weights is not None:
        with only_known_classes(f"checkpoint {weights}"):
            content = dist_checkpointing.load_content_metadata(str(weights)) or {}
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return {**content, "dp_cp_group": group}
