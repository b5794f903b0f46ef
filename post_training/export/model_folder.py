"""Writing a model as a Hugging Face folder, reading it back and comparing. Collective calls."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer import MegatronModule
from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format
from tqdm import tqdm

from post_training.checkpoints import huggingface, loading
from post_training.checkpoints.huggingface import SmallFiles
from post_training.checkpoints.source import Source
from post_training.common import files, safetensors_index
from post_training.common.quiet import quiet
from post_training.config.options import StageOptions
from post_training.distributed.collectives import from_all_ranks, on_first_rank
from post_training.distributed.session import Session
from post_training.export import (
    comparison,
    compressed_tensors,
    computed_as,
    modelopt_integers,
    readback,
    scaled_fp8,
)
from post_training.export.carried import Carried
from post_training.export.compressed_mixture import Mixture
from post_training.export.fake_quantized import fake_quantized, unpack
from post_training.export.folder import Tensors, require_equal, write_tensors
from post_training.export.layout import Configuration
from post_training.export.streaming_exporter import StreamingExporter
from post_training.models.builder import torch_dtype
from post_training.models.families import registry as families
from post_training.quantization import quantizers
from post_training.quantization.engines.base import MIXED_COMPRESSED

logger = logging.getLogger("post_training")

# By what they are exported as; the others are written by ModelOpt.
_LAYOUTS = {
    **scaled_fp8.LAYOUTS,
    **compressed_tensors.LAYOUTS,
    **modelopt_integers.LAYOUTS,
    MIXED_COMPRESSED: Mixture(),
}


def state_dtype(config: dict[str, Any], dtype: torch.dtype) -> None:
    """Say in ``config.json`` what the weights are stored in, under one name.

    transformers has renamed it; engines of either time read the name that the source has.
    """
    key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    config.pop("torch_dtype", None)
    config[key] = str(dtype).removeprefix("torch.")


def write(
    model: MegatronModule,
    source: Source,
    options: StageOptions,
    session: Session,
    folder: Path,
    *,
    max_shard_bytes: int,
    target: str,
    allow_unexportable: bool = False,
) -> dict[str, Any]:
    """Write ``model`` into the working folder of ``folder`` and verify it. Returns the metrics.

    Args:
        model: this rank's part, tensor-parallel size 1.
        target: the engine that is to read the folder, by its name in ``--target``.

    Raises:
        UsageError: if the format cannot be exported, or what was written is not the model.
    """
    judged = quantizers.judge_model(model, required=not allow_unexportable, target=target)
    unpack(model)
    layout = _LAYOUTS.get(judged.quant_algo)
    dtype = torch_dtype(options.precision)
    original = loading.local_huggingface(source, options)
    # ModelOpt announces on stdout what the log says already.
    with quiet(stdout=True):
        exporter = StreamingExporter(
            model,
            pretrained_model_name_or_path=str(original),
            dtype=dtype,
            trust_remote_code=options.trust_remote_code,
            # Export the scale that was calibrated and scored, not one rounded up to 1.
            clamp_kv_cache_scales=False,
        )
    count = len(model.decoder.layers) + 1 + model.pre_process
    progress = partial(tqdm, total=count, unit="layer", disable=not session.show_progress)
    work = on_first_rank(lambda: files.begin(folder))
    # Replicas have the same weights and scales.
    is_writer = parallel_state.get_data_parallel_rank() == 0
    groups: Iterable[Tensors] = ()
    layout = layout.of(exporter) if layout else None
    if is_writer:
        groups = exporter.groups() if layout is None else layout.groups(exporter, dtype)
    carried = Carried.of(original, session)
    groups = chain(progress(groups, desc="writing"), carried.groups())
    write_tensors(work, groups, max_shard_bytes)
    if layout is not None:
        layout = layout.complete()
    of_modelopt = exporter.quantization_config() if layout is None else None
    if of_modelopt is not None and carried.names:
        excluded = of_modelopt["quantization"].setdefault("exclude_modules", [])
        excluded.extend(carried.excluded())

    def write_small_files() -> None:
        # A checkpoint pruned elsewhere comes with the configuration of before.
        config = families.with_shape(huggingface.read_config(original), vars(model.config))
        state_dtype(config, dtype)
        config.pop("quantization_config", None)
        said = None
        if of_modelopt is not None:
            said = Configuration(convert_hf_quant_config_format(of_modelopt), of_modelopt)
        elif layout is not None:
            index = safetensors_index.read(work)
            said = layout.configuration(index, judged.kv_cache_quant_algo)
        if said is not None:
            config["quantization_config"] = said.declared
            if said.beside is not None:
                files.write_json(work / readback.QUANT_CONFIG, said.beside)
        SmallFiles(original, options.trust_remote_code, config).copy_to(work)

    on_first_rank(write_small_files)
    written = readback.Folder(work, session.device, carried=carried.names)
    problems: list[str] = []
    if session.is_main:
        problems += written.problems()
        problems += computed_as.problems(written.config, source.architecture)
    mine: list[str] = []
    views = exporter.views(fake_quantized) if is_writer else ()
    for (group,) in progress(views, desc="reading back"):
        mine += group
        problems += comparison.compare(written, group.items(), dtype)
    problems += carried.problems(written)
    mine += carried.names
    compared = {name for each in from_all_ranks(mine) for name in each}
    if session.is_main:
        missing = sorted(written.expected.keys() - compared)
        problems += [f"{name} was not compared" for name in missing]
    require_equal(problems, work)
    algorithm = written.quantization.get("quant_algo")
    logger.info("read back: %d tensors equal the model's, format %s", len(compared), algorithm)
    return {
        "tensors_compared": len(compared),
        "tensors_carried": len(carried.names),
        "quant_algo": algorithm,
        "kv_cache_quant_algo": written.quantization.get("kv_cache_quant_algo"),
        "bits_per_weight": round(written.bits_per_weight(), 4),
    }
