"""Writing a model as a Hugging Face folder, reading it back and comparing. Collective calls."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
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
from post_training.common.safetensors_index import Entry
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
from post_training.export.fake_quantized import as_computed, unpack
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


class Writer:
    """What a folder is written from and compared with: a model whose format is known.

    Args:
        model: this rank's part, tensor-parallel size 1.
        target: the engine that is to read the folder, by its name in ``--target``.

    Raises:
        UsageError: if the format cannot be exported.
    """

    def __init__(
        self,
        model: MegatronModule,
        source: Source,
        options: StageOptions,
        session: Session,
        target: str,
        allow_unexportable: bool = False,
    ) -> None:
        judged = quantizers.judge_model(model, required=not allow_unexportable, target=target)
        self.kv_cache = judged.kv_cache_quant_algo
        self.dtype = torch_dtype(options.precision)
        self.original = loading.local_huggingface(source, options)
        self.carried = Carried.of(self.original, session)
        self._model_config, self._is_main = vars(model.config), session.is_main
        self._architecture, self._trusted = source.architecture, options.trust_remote_code
        # Replicas have the same weights and scales.
        self.is_writer = parallel_state.get_data_parallel_rank() == 0
        # ModelOpt announces on stdout what the log says already.
        with quiet(stdout=True):
            self.exporter = StreamingExporter(
                model,
                pretrained_model_name_or_path=str(self.original),
                dtype=self.dtype,
                trust_remote_code=self._trusted,
                # Export the scale that was calibrated and scored, not one rounded up to 1.
                clamp_kv_cache_scales=False,
            )
        layout = _LAYOUTS.get(judged.quant_algo)
        self.layout = layout.of(self.exporter) if layout else None

    def groups(self) -> Iterable[Tensors]:
        """The tensors that this rank writes, a group a layer."""
        if not self.is_writer:
            return ()
        if self.layout is None:
            return self.exporter.groups()
        return self.layout.groups(self.exporter, self.dtype)

    def views(self) -> Iterator[Tensors]:
        """The values that they stand for."""
        for (group,) in self.exporter.views(as_computed) if self.is_writer else ():
            yield group

    def configuration(self, index: Callable[[], Mapping[str, Entry]]) -> Configuration | None:
        """How the groups that were given are quantized; a collective call.

        Args:
            index: of the tensors that were written.
        """
        if self.layout is not None:
            return self.layout.configuration(index(), self.kv_cache)
        found = self.exporter.quantization_config()
        if found is None:
            return None
        if self.carried.names:
            excluded = found["quantization"].setdefault("exclude_modules", [])
            excluded.extend(self.carried.excluded())
        return Configuration(convert_hf_quant_config_format(found), found)

    def config(self, said: Configuration | None) -> dict[str, Any]:
        """Content of ``config.json``."""
        # A checkpoint pruned elsewhere comes with the configuration of before.
        config = families.with_shape(huggingface.read_config(self.original), self._model_config)
        state_dtype(config, self.dtype)
        config.pop("quantization_config", None)
        return config if said is None else {**config, "quantization_config": said.declared}

    def write_small_files(self, work: Path) -> None:
        """What is no tensor; a collective call."""
        of_modelopt = self.configuration(dict) if self.layout is None else None
        if self.layout is not None:
            self.layout = self.layout.complete()

        def write() -> None:
            said = of_modelopt
            if self.layout is not None:
                said = self.configuration(lambda: safetensors_index.read(work))
            if said is not None and said.beside is not None:
                files.write_json(work / readback.QUANT_CONFIG, said.beside)
            SmallFiles(self.original, self._trusted, self.config(said)).copy_to(work)

        on_first_rank(write)

    def problems(self, written: readback.Folder) -> list[str]:
        """What is wrong with a folder whatever its values, and with what no layer has."""
        if not self._is_main:
            return []
        found = written.problems()
        found += computed_as.problems(written.config, self._architecture)
        return found + self.carried.problems(written)

    def metrics(self, written: readback.Folder, compared: int) -> dict[str, Any]:
        """For the manifest; a folder that was compared."""
        algorithm = written.quantization.get("quant_algo")
        logger.info("read back: %d tensors equal the model's, format %s", compared, algorithm)
        return {
            "tensors_compared": compared,
            "tensors_carried": len(self.carried.names),
            "quant_algo": algorithm,
            "kv_cache_quant_algo": written.quantization.get("kv_cache_quant_algo"),
            "bits_per_weight": round(written.bits_per_weight(), 4),
        }


def not_compared(written: readback.Folder, compared: Collection[str]) -> list[str]:
    """The tensors of the architecture that were not compared, each a problem."""
    return [f"{name} was not compared" for name in sorted(written.expected.keys() - compared)]


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
    writer = Writer(model, source, options, session, target, allow_unexportable)
    unpack(model)
    count = len(model.decoder.layers) + 1 + model.pre_process
    progress = partial(tqdm, total=count, unit="layer", disable=not session.show_progress)
    work = on_first_rank(lambda: files.begin(folder))
    groups = chain(progress(writer.groups(), desc="writing"), writer.carried.groups())
    write_tensors(work, groups, max_shard_bytes)
    writer.write_small_files(work)
    written = readback.Folder(work, session.device, carried=writer.carried.names)
    problems, mine = writer.problems(written), list(writer.carried.names)
    for group in progress(writer.views(), desc="reading back"):
        mine += group
        problems += comparison.compare(written, group.items(), writer.dtype)
    compared = {name for each in from_all_ranks(mine) for name in each}
    if session.is_main:
        problems += not_compared(written, compared)
    require_equal(problems, work)
    return writer.metrics(written, len(compared))
