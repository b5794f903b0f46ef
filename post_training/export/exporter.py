"""megatron-core model -> Hugging Face folder, as inference engines load it.

ModelOpt's exporter maps names, slices fused layers and packs weights. It is driven layer by layer
here, so that host memory holds one shard at a time. What is written is then read back by
:mod:`post_training.export.readback`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import modelopt
import torch
from megatron.core.transformer import MegatronModule
from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format
from modelopt.torch.export.quant_utils import process_layer_quant_config
from tqdm import tqdm

from post_training.checkpoints import huggingface
from post_training.common import files
from post_training.common.quiet import quiet
from post_training.distributed.collectives import on_first_rank
from post_training.export.shards import ShardWriter, Tensors, join_shards
from post_training.export.streaming_exporter import StreamingExporter
from post_training.models.families import registry as families

QUANT_CONFIG = "hf_quant_config.json"


class Exporter:
    """One model on its way to a folder. Every rank of the model takes part in every method.

    Args:
        model: this rank's part, tensor-parallel size 1.
        source: folder with the configuration and tokenizer that go with the model.
        dtype: of the tensors that are not quantized.
    """

    def __init__(
        self,
        model: MegatronModule,
        source: Path,
        dtype: torch.dtype,
        *,
        trust_remote_code: bool = False,
    ) -> None:
        self.model = model
        self.source = source
        self._arguments: dict[str, Any] = {
            "pretrained_model_name_or_path": str(source),
            "dtype": dtype,
            "trust_remote_code": trust_remote_code,
            # Export the scale that was calibrated and scored, not one rounded up to 1.
            "clamp_kv_cache_scales": False,
        }
        self._exporter = self._new(reference=False)

    def write(self, folder: Path, max_shard_bytes: int, show_progress: bool = False) -> None:
        """Write shards, index and every small file into ``folder``, which exists and is empty."""
        rank = torch.distributed.get_rank()
        writer = ShardWriter(folder, f"rank{rank:05d}", max_shard_bytes)
        for group in self._progress(self._exporter.groups(), "writing", show_progress):
            writer.add(group)
        join_shards(folder, writer.finish())
        quantization = self.quantization_config()

        def write_small_files() -> None:
            python_files = self._arguments["trust_remote_code"]
            huggingface.SmallFiles(self.source, python_files).copy_to(folder)
            files.write_json(folder / "config.json", self._config(quantization))
            if quantization is not None:
                files.write_json(folder / QUANT_CONFIG, quantization)

        on_first_rank(write_small_files)

    def reference(self, show_progress: bool = False) -> Iterator[Tensors]:
        """This rank's weights once more, fake-quantized by the model itself, in float32.

        Independent of how :meth:`write` packs: what an exact export dequantizes to. The scales of
        inputs, keys and values come along, from the calibrated maxima.
        """
        groups = self._new(reference=True).groups()
        yield from self._progress(groups, "reading back", show_progress)

    def _progress(self, groups: Iterator[Tensors], name: str, shown: bool) -> Iterator[Tensors]:
        total = len(self.model.decoder.layers) + 1 + self.model.pre_process
        yield from tqdm(groups, desc=name, total=total, unit="layer", disable=not shown)

    def quantization_config(self) -> dict[str, Any] | None:
        """Content of ``hf_quant_config.json``; None for a model that is not quantized."""
        layers = self._exporter._gather_layer_config_dict()
        excluded = self._exporter._gather_exclude_modules()
        kv_cache = self._exporter._gather_kv_cache_dtype()
        if not layers and kv_cache is None:
            return None
        quantization = {"quant_algo": None, "kv_cache_quant_algo": None}
        if layers:
            quantization = process_layer_quant_config(layers)
            quantization["exclude_modules"] = excluded
        quantization["kv_cache_quant_algo"] = kv_cache
        return {
            "producer": {"name": "modelopt", "version": modelopt.__version__},
            "quantization": quantization,
        }

    def _config(self, quantization: dict[str, Any] | None) -> dict[str, Any]:
        # A checkpoint pruned elsewhere comes with the configuration of before.
        config = families.with_shape(huggingface.read_config(self.source), vars(self.model.config))
        name = str(self._arguments["dtype"]).removeprefix("torch.")
        config["dtype" if "torch_dtype" not in config else "torch_dtype"] = name
        config.pop("quantization_config", None)
        if quantization is not None:
            config["quantization_config"] = convert_hf_quant_config_format(quantization)
        return config

    def _new(self, *, reference: bool) -> StreamingExporter:
        # ModelOpt announces on stdout what the log says already.
        with quiet(stdout=True):
            exporter = StreamingExporter(self.model, **self._arguments)
        exporter.reference = reference
        return exporter
