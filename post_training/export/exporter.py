"""megatron-core model -> Hugging Face folder, as inference engines load it.

ModelOpt's exporter maps names, slices fused layers and packs weights. It is extended here where it
falls short (each method says how) and driven layer by layer, so that host memory holds one shard at
a time. What is written is then read back by :mod:`post_training.export.readback`.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections import OrderedDict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from post_training.checkpoints import huggingface
from post_training.common import files, safetensors_index
from post_training.common.errors import UsageError
from post_training.models import families

if TYPE_CHECKING:
    import torch
    from megatron.core.transformer import MegatronModule

logger = logging.getLogger(__name__)

QUANT_CONFIG = "hf_quant_config.json"
Tensors = dict[str, "torch.Tensor"]


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
        import torch

        rank = torch.distributed.get_rank()
        writer = ShardWriter(folder, f"rank{rank:05d}", max_shard_bytes)
        for group in self._progress(self._exporter.groups(), "writing", show_progress):
            writer.add(group)
        join_shards(folder, writer.finish())
        quantization = self.quantization_config()
        if rank == 0:
            huggingface.copy_small_files(
                self.source, folder, python_files=self._arguments["trust_remote_code"]
            )
            files.write_json(folder / "config.json", self._config(quantization))
            if quantization is not None:
                files.write_json(folder / QUANT_CONFIG, quantization)
        torch.distributed.barrier()

    def reference(self, show_progress: bool = False) -> Iterator[Tensors]:
        """This rank's weights once more, fake-quantized by the model itself, in float32.

        Independent of how :meth:`write` packs: what an exact export dequantizes to. The scales of
        inputs, keys and values come along, from the calibrated maxima.
        """
        groups = self._new(reference=True).groups()
        yield from self._progress(groups, "reading back", show_progress)

    def _progress(self, groups: Iterator[Tensors], name: str, shown: bool) -> Iterator[Tensors]:
        from tqdm import tqdm

        total = len(self.model.decoder.layers) + 1 + self.model.pre_process
        yield from tqdm(groups, desc=name, total=total, unit="layer", disable=not shown)

    def quantization_config(self) -> dict[str, Any] | None:
        """Content of ``hf_quant_config.json``; None for a model that is not quantized."""
        import modelopt
        from modelopt.torch.export.quant_utils import process_layer_quant_config

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
        from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format

        # A checkpoint pruned elsewhere comes with the configuration of before.
        config = families.with_shape(huggingface.read_config(self.source), vars(self.model.config))
        name = str(self._arguments["dtype"]).removeprefix("torch.")
        config["dtype" if "torch_dtype" not in config else "torch_dtype"] = name
        config.pop("quantization_config", None)
        if quantization is not None:
            config["quantization_config"] = convert_hf_quant_config_format(quantization)
        return config

    def _new(self, *, reference: bool) -> Any:
        # ModelOpt announces on stdout what the log says already.
        with contextlib.redirect_stdout(io.StringIO()):
            exporter = exporter_class()(self.model, **self._arguments)
        exporter.reference = reference
        return exporter


@cache
def exporter_class() -> Any:
    """ModelOpt's exporter, extended; made when it is needed, since ModelOpt is imported late."""
    import torch
    from megatron.core.transformer.transformer_layer import TransformerLayer
    from modelopt.torch.export.model_config import QUANTIZATION_NVFP4, QUANTIZATION_W4A16_NVFP4
    from modelopt.torch.export.unified_export_megatron import GPTModelExporter

    class StreamingExporter(GPTModelExporter):
        """ModelOpt's exporter, one layer at a time."""

        reference = False
        kv_cache_dtype: str | None = None
        _state_dict: Any

        def groups(self) -> Iterator[Tensors]:
            """Tensors by Hugging Face name: embedding, each layer, then final norm and head."""
            model = self.model
            # With a draft the last pipeline stage has a copy of the embedding too.
            if model.pre_process:
                self.rules["word_embeddings"](model.embedding.word_embeddings)
                yield self._take()
            for layer in model.decoder.layers:
                number = layer.layer_number - 1
                if isinstance(layer, TransformerLayer):
                    self._get_transformer_layer_state_dict(layer, number)
                else:
                    self._get_mamba_layer_state_dict(layer, number)
                yield self._take()
            if getattr(model.decoder, "final_layernorm", None):
                self.rules["final_layernorm"](model.decoder.final_layernorm)
            if getattr(model.decoder, "final_norm", None):
                self.rules["final_norm"](model.decoder.final_norm)
            if hasattr(model, "output_layer") and not model.share_embeddings_and_output_weights:
                self.rules["output_layer"](model.output_layer)
            yield self._take()

        def draft(self, architecture: str) -> Tensors:
            """The tensors of an attached draft, by the rules of ``architecture``."""
            self.rules = self.all_rules[architecture]
            self._get_eagle_module_state_dict()
            return self._take()

        def _take(self) -> Tensors:
            tensors, self._state_dict = dict(self._state_dict), OrderedDict()
            return tensors

        def _populate_rule_book(self) -> dict[str, Any]:
            """KV scales get the names that ModelOpt's Hugging Face path writes.

            vLLM and SGLang read ``k_proj.k_scale`` as well as ``k_scale``, TensorRT-LLM the former
            alone.
            """
            rules = super()._populate_rule_book()
            for rule in rules.values():
                if "core_attention" in rule:
                    scaling = rule["core_attention"]
                    rule["core_attention"] = lambda module, *where, _rule=scaling, **options: _rule(
                        module,
                        *where,
                        **{
                            "k_scale_name": "k_proj.k_scale",
                            "v_scale_name": "v_proj.v_scale",
                            **options,
                        },
                    )
            return rules

        def _get_weight_bias(
            self, module: Any, dtype: Any = None, name_to_value: Tensors | None = None
        ) -> Tensors:
            """As the original, but tensors stay on the GPU, where packing is fast."""
            found = {} if name_to_value is None else name_to_value
            for name in ("weight", "bias", "expert_bias"):
                value = getattr(module, name, None)
                if value is not None and value.numel() > 0:
                    found[name] = value.detach().to(dtype)
            return found

        def _get_quantized_state(
            self, module: Any, dtype: Any = None, prefix: str = ""
        ) -> tuple[Tensors, str | None, int]:
            """Packs the weights that the forward pass used, so that what was scored is exported.

            The original divides the unrounded weight in bf16, which rounds twice; and any other
            order of multiplying and dividing than the kernel's rounds weights that lie between
            two codes the other way. Fake-quantized weights lie on their codes.
            """
            if self.reference:
                state = self._get_weight_bias(module, torch.float32)
                if "weight" in state:
                    state["weight"] = fake_quantized(module).float()
                scale = _calibrated_scale(getattr(module, "input_quantizer", None))
                if scale is not None:
                    state["input_scale"] = scale
                return state, None, 0
            state, quantization, block_size = super()._get_quantized_state(module, dtype, prefix)
            if "weight_scale" in state:
                state["weight"] = fake_quantized(module).float()
            if quantization in (QUANTIZATION_NVFP4, QUANTIZATION_W4A16_NVFP4):
                state["weight_scale"] = nvfp4_block_scales(
                    module.weight_quantizer,
                    state["weight"],
                    state["weight_scale"],
                    state["weight_scale_2"],
                )
            return state, quantization, block_size

        def _self_attention_scaling(self, module: Any, prefix: str, **options: Any) -> None:
            if not self.reference:
                super()._self_attention_scaling(module, prefix, **options)
                return
            for kind in ("k", "v"):
                scale = _calibrated_scale(getattr(module, f"{kind}_bmm_quantizer", None))
                if scale is not None:
                    self._state_dict[prefix + options[f"{kind}_scale_name"]] = scale

    return StreamingExporter


def fake_quantized(module: Any) -> torch.Tensor:
    """The module's weight as its forward pass uses it."""
    import torch

    weight = module.weight.detach()
    quantizer = getattr(module, "weight_quantizer", None)
    if quantizer is None:
        return weight
    with torch.no_grad():
        return quantizer(weight).detach()


def nvfp4_block_scales(
    quantizer: Any,
    weight: torch.Tensor,
    from_unrounded: torch.Tensor,
    tensor_scale: torch.Tensor,
) -> torch.Tensor:
    """The E4M3 scale of each block with which ``weight`` lies on E2M1 codes.

    A block's maximum over six times the tensor's scale may fall on a tie between two E4M3 codes:
    the kernel that computed the fake quantization, whose division is not correctly rounded, and
    the packer then decide differently. The fake-quantized block tells which one it was, since its
    maximum is six times its scale; except for scales in E4M3's subnormal range, whose rounding is
    coarser than the step from 4 to 6, and there the unrounded weight is right.

    Args:
        quantizer: the weight's.
        weight: fake-quantized, float32 [out, in].
        from_unrounded: E4M3 [out, in / 16], computed from the weight before quantization.
        tensor_scale: float32 scalar.
    """
    import torch
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    from_rounded, _ = NVFP4QTensor.get_weights_scaling_factor_from_quantizer(
        quantizer, weight, tensor_scale
    )

    def error(scales: torch.Tensor) -> torch.Tensor:
        block = weight.unflatten(-1, (scales.shape[-1], -1))
        step = (scales.float() * tensor_scale.to(weight.device)).unsqueeze(-1)
        scaled = (block / step).abs_()
        codes = torch.bucketize(scaled, NVFP4QTensor.get_e2m1_bounds(weight.device))
        nearest = NVFP4QTensor.get_e2m1_values(weight.device)[codes]
        return ((nearest - scaled).abs_() * step).amax(-1)

    better = error(from_rounded) < error(from_unrounded)
    # float8 has no torch.where: its bytes are chosen.
    return torch.where(
        better, from_rounded.view(torch.uint8), from_unrounded.view(torch.uint8)
    ).view(torch.float8_e4m3fn)


def _calibrated_scale(quantizer: Any) -> torch.Tensor | None:
    """The scale that follows from a quantizer's maximum: E4M3 ends at 448, E2M1 at 6.

    None where nothing was calibrated: off, dynamic, or in blocks with a power of two (MX).
    """
    amax = getattr(quantizer, "amax", None)
    if amax is None or not quantizer.is_enabled or amax.numel() != 1:
        return None
    largest = {(4, 3): 448.0, (2, 1): 6.0 * 448.0}.get(quantizer.num_bits)
    blocks = quantizer.block_sizes or {}
    if largest is None or blocks.get("scale_bits") == (8, 0):
        return None
    return amax.detach().float().reshape(()) / largest


class ShardWriter:
    """Collects tensors and writes a file whenever ``max_bytes`` would be passed."""

    def __init__(self, folder: Path, prefix: str, max_bytes: int) -> None:
        self._folder = folder
        self._prefix = prefix
        self._max_bytes = max_bytes
        self._pending: Tensors = {}
        self._pending_bytes = 0
        self._files: list[str] = []

    def add(self, tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            size = tensor.numel() * tensor.element_size()
            if self._pending and self._pending_bytes + size > self._max_bytes:
                self._flush()
            # safetensors refuses views that share memory; scales are shared between q, k and v.
            self._pending[name] = tensor.detach().cpu().contiguous().clone()
            self._pending_bytes += size

    def finish(self) -> list[str]:
        """Write what is left. Returns the file names in order."""
        if self._pending:
            self._flush()
        return self._files

    def _flush(self) -> None:
        from safetensors.torch import save_file

        name = f"{self._prefix}-{len(self._files):05d}.safetensors"
        save_file(self._pending, self._folder / name, metadata={"format": "pt"})
        self._files.append(name)
        self._pending, self._pending_bytes = {}, 0


def join_shards(folder: Path, mine: list[str]) -> None:
    """Give all ranks' files their final names and write the index; a collective call.

    Raises:
        UsageError: if two ranks wrote a tensor of the same name.
    """
    import torch

    world = torch.distributed.get_world_size()
    gathered: list[Any] = [None] * world
    torch.distributed.all_gather_object(gathered, mine)
    names = [name for each in gathered for name in each]
    if torch.distributed.get_rank() == 0:
        weight_map: dict[str, str] = {}
        total = 0
        for number, name in enumerate(names, start=1):
            final = f"model-{number:05d}-of-{len(names):05d}.safetensors"
            if len(names) == 1:
                final = safetensors_index.SINGLE
            (folder / name).rename(folder / final)
            for tensor, entry in safetensors_index.read_file(folder / final).items():
                if tensor in weight_map:
                    raise UsageError(
                        f"export {folder}",
                        f"two ranks wrote {tensor}",
                        "export at TP=1 and DP=1, which export.sh chooses",
                    )
                weight_map[tensor] = final
                total += entry.bytes
        if len(names) > 1:
            index = {
                "metadata": {"total_size": total},
                "weight_map": dict(sorted(weight_map.items())),
            }
            files.write_json(folder / safetensors_index.INDEX, index)
    torch.distributed.barrier()
