"""A folder for ModelOpt's ``vllm_serve_fakequant.py``: vLLM that simulates the quantization.

The weights are those that the quantized model computes with, rounded and stored in 16 bits; the
calibrated maxima of inputs, keys and values lie beside them in ``quantizer_state.pth``, which is
ModelOpt's name and form. It serves formats that no engine has kernels for, and saves no memory.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer import MegatronModule
from modelopt.torch.quantization.utils import get_quantizer_state_dict
from tqdm import tqdm

from post_training.checkpoints import huggingface, loading
from post_training.checkpoints.huggingface import SmallFiles
from post_training.checkpoints.source import Source
from post_training.common import files
from post_training.common.quiet import quiet
from post_training.config.options import StageOptions
from post_training.distributed.collectives import from_all_ranks, on_first_rank
from post_training.distributed.session import Session
from post_training.export import comparison, readback
from post_training.export.carried import Carried
from post_training.export.fake_quantized import fake_quantized, unpack
from post_training.export.folder import Tensors, require_equal, write_tensors
from post_training.export.model_folder import state_dtype
from post_training.export.streaming_exporter import StreamingExporter
from post_training.models.builder import torch_dtype
from post_training.models.families import registry as families

logger = logging.getLogger("post_training")

STATE = "quantizer_state.pth"
_QUANTIZER = "_quantizer."
_SCALE = "input_scale"


class _Exporter(StreamingExporter):
    """Rounded weights in ``dtype``, with the state of the other quantizers of their layer."""

    def _get_quantized_state(
        self, module: Any, dtype: Any = None, prefix: str = ""
    ) -> tuple[Tensors, str | None, int]:
        if self._view is not None:
            return super()._get_quantized_state(module, dtype, prefix)
        state = self._get_weight_bias(module, dtype)
        if "weight" in state:
            state["weight"] = fake_quantized(module).to(dtype)
            for name, values in get_quantizer_state_dict(module).items():
                if "weight_quantizer" not in name:
                    state |= {f"{name}.{key}": value.to(dtype) for key, value in values.items()}
        return state, None, 0

    def quantizer_name(self, name: str) -> str:
        """``...q_proj.input_quantizer._amax`` under the name of the files' linear layer."""
        module, quantizer, key = name.rsplit(".", 2)
        return f"{self._joining.module(module)}.{quantizer}.{key}"

    def _self_attention_scaling(self, module: Any, prefix: str, **options: Any) -> None:
        """Keys and values are quantized by the state of their quantizers."""
        if self._view is not None:
            return
        for name, values in get_quantizer_state_dict(module).items():
            for key, value in values.items():
                self._state_dict[f"{prefix}{name}.{key}"] = value


def write(
    model: MegatronModule,
    source: Source,
    options: StageOptions,
    session: Session,
    target: Path,
    *,
    max_shard_bytes: int,
) -> dict[str, Any]:
    """Write ``model`` into the working folder of ``target`` and verify it. Returns the metrics.

    Args:
        model: this rank's part, tensor-parallel size 1.

    Raises:
        UsageError: if what was written is not the model.
    """
    unpack(model)
    dtype = torch_dtype(options.precision)
    original = loading.local_huggingface(source, options)
    with quiet(stdout=True):
        exporter = _Exporter(
            model,
            pretrained_model_name_or_path=str(original),
            dtype=dtype,
            trust_remote_code=options.trust_remote_code,
        )
    count = len(model.decoder.layers) + 1 + model.pre_process
    progress = partial(tqdm, total=count, unit="layer", disable=not session.show_progress)
    work = on_first_rank(lambda: files.begin(target))
    state: Tensors = {}

    def weights() -> Iterator[Tensors]:
        for group in progress(exporter.groups(), desc="writing"):
            found = {name: value for name, value in group.items() if _QUANTIZER in name}
            for name, value in found.items():
                state[exporter.quantizer_name(name)] = value.detach().cpu().clone()
            yield {name: value for name, value in group.items() if name not in found}

    carried = Carried.of(original, session)
    write_tensors(work, chain(weights(), carried.groups()), max_shard_bytes)
    states = from_all_ranks(state)

    def write_small_files() -> None:
        config = families.with_shape(huggingface.read_config(original), vars(model.config))
        state_dtype(config, dtype)
        config.pop("quantization_config", None)
        SmallFiles(original, options.trust_remote_code, config).copy_to(work)
        merged = {name: value for each in states for name, value in each.items()}
        torch.save(merged, work / STATE)

    on_first_rank(write_small_files)
    written = readback.Folder(work, session.device, carried=carried.names)
    problems = written.problems() if session.is_main else []
    compared: list[str] = []
    for (group,) in progress(exporter.views(fake_quantized), desc="reading back"):
        plain = {name: value for name, value in group.items() if not name.endswith(_SCALE)}
        compared += plain
        problems += comparison.compare(written, plain.items(), dtype)
    problems += carried.problems(written)
    compared += carried.names
    names = {name for each in from_all_ranks(compared) for name in each}
    if session.is_main:
        problems += [f"{name} was not compared" for name in sorted(written.expected.keys() - names)]
    require_equal(problems, work)
    logger.info("read back: %d tensors equal the model's, rounded and in 16 bits", len(names))
    return {
        "tensors_compared": len(names),
        "tensors_carried": len(carried.names),
        "quant_algo": None,
        "kv_cache_quant_algo": None,
        "fake_quantizers": sum(map(len, states)),
        "bits_per_weight": round(written.bits_per_weight(), 4),
    }
