"""ModelOpt's importer of Hugging Face folders, extended where it falls short."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.ssm.gated_delta_net import GatedDeltaNet
from megatron.core.transformer.identity_op import IdentityOp
from modelopt.torch.export.plugins.mcore_common import all_mcore_hf_import_mapping
from modelopt.torch.export.plugins.megatron_importer import GPTModelImporter
from safetensors import safe_open

from post_training.checkpoints import delta_net_import, dequantize, rank_parts
from post_training.checkpoints.dequantize import BlockFp8, Exported, Mxfp4
from post_training.common.safetensors_index import Entry
from post_training.models import post_norms
from post_training.models.families import registry as families

_BESIDE_ATTENTION = ("input_layernorm", "pre_mlp_layernorm", "mlp")


class Importer(GPTModelImporter):
    """Reads one tensor at a time, this rank's slice, and records the names that were read.

    Attributes:
        index: what the folder has.
        joined: linear layers of the folder that hold several of the importer's, with the rows of
            each part (:meth:`Family.joined`).
        divided: those that hold parts of the importer's, with the rows that each has
            (:meth:`Family.divided`).
        reader: of the folder's quantized weights; None if it has plain ones.
        exported: reads a folder that an export made of a quantized model; ``index`` then has the
            weights as they are read, and no scales.
        names_read: of the folder's tensors.
    """

    index: Mapping[str, Entry]
    joined: Mapping[str, Mapping[str, int]]
    divided: Mapping[str, Mapping[str, Sequence[int]]]
    reader: BlockFp8 | Mxfp4 | None
    exported: Exported | None = None
    _of_parts: Mapping[str, Sequence[int]] = {}
    names_read: set[str]

    def _get_safetensor(self, key: str, parallel_config: Any = None) -> torch.Tensor:
        if key not in self.index:
            family = families.FAMILIES[self.arch]
            key = family.stored_name(family.other_names.get(key, key))
        if key in self.index:
            self.names_read.add(key)
            if sizes := self._of_parts.get(key):
                return self._of_each(key, sizes)
            if self.exported is not None:
                return rank_parts.part_of(self.exported.read(key), parallel_config)
            found = super()._get_safetensor(key, parallel_config=parallel_config)
            return self._decoded(
                key, found, rank_parts.starts(found, self.index[key], parallel_config)
            )
        if isinstance(self.reader, Mxfp4) and f"{key}{self.reader.codes}" in self.index:
            codes, scales = key + self.reader.codes, key + self.reader.scales
            self.names_read |= {codes, scales}
            return self.reader.decode(
                super()._get_safetensor(codes, parallel_config=parallel_config),
                super()._get_safetensor(scales, parallel_config=parallel_config),
            )
        module, _, kind = key.rpartition(".")
        parent, _, part = module.rpartition(".")
        for whole, parts in self.joined.items():
            name = f"{parent}.{whole}.{kind}"
            if part in parts and name in self.index:
                self.names_read.add(name)
                return self._part(name, parts, part, parallel_config)
        raise KeyError(f"the source has no tensor {key}")

    def _part(
        self, name: str, parts: Mapping[str, int], part: str, parallel_config: Any
    ) -> torch.Tensor:
        """This rank's rows of one part of a joined tensor."""
        names = list(parts)
        start, rows = sum(parts[each] for each in names[: names.index(part)]), parts[part]
        if parallel_config is not None:
            rows //= parallel_state.get_tensor_model_parallel_world_size()
            start += rows * parallel_state.get_tensor_model_parallel_rank()
        if self.index[name].shape[0] != sum(parts.values()):
            raise ValueError(f"{name} has {self.index[name].shape[0]} rows, not {parts}")
        with self._rows(name) as whole:
            found = whole[start : start + rows].contiguous()
        return self._decoded(name, found, (start, 0))

    def _import_mamba_layer(self, layer: Any, layer_id: int, *args: Any) -> None:
        """The original reads all rows on each rank, or, of the input projection, wrong ones."""
        mixer, ranks = layer.mixer, parallel_state.get_tensor_model_parallel_world_size()
        inner, heads, states = mixer.d_inner, mixer.nheads, mixer.ngroups * mixer.d_state
        mixed = (inner, states, states)
        prefix = self._prefix("in_proj").removesuffix("in_proj.").format(layer_id)
        self._of_parts = (
            {}
            if ranks == 1
            else {
                f"{prefix}in_proj.weight": (inner, *mixed, heads),
                f"{prefix}conv1d.weight": mixed,
                f"{prefix}conv1d.bias": mixed,
                f"{prefix}norm.weight": (inner,),
                **{f"{prefix}{name}": (heads,) for name in ("A_log", "D", "dt_bias")},
            }
        )
        super()._import_mamba_layer(layer, layer_id, *args)

    def _of_each(self, name: str, sizes: Sequence[int]) -> torch.Tensor:
        """This rank's rows of each part of a tensor, whose parts have so many rows in all."""
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        rank, start, found = parallel_state.get_tensor_model_parallel_rank(), 0, []
        if self.index[name].shape[0] != sum(sizes):
            raise ValueError(f"{name} has {self.index[name].shape[0]} rows, not {sum(sizes)}")
        with self._rows(name) as rows:
            for size in sizes:
                mine = size // ranks
                found.append(rows[start + rank * mine : start + (rank + 1) * mine])
                start += size
        return torch.cat(found)

    @contextlib.contextmanager
    def _rows(self, name: str) -> Iterator[Any]:
        """A tensor of which some rows are read."""
        if self.exported is not None:
            yield self.exported.read(name)
            return
        with safe_open(self.index[name].path, framework="pt") as file:
            yield file.get_slice(name)

    def _decoded(self, name: str, found: torch.Tensor, starts: tuple[int, ...]) -> torch.Tensor:
        """The values of a tensor that may be quantized, of which ``found`` is this rank's slice."""
        if not dequantize.is_packed(self.index[name]):
            return found
        scales = name + self.reader.scales if self.reader else ""
        if not isinstance(self.reader, BlockFp8) or scales not in self.index:
            raise ValueError(f"{name} is FP8, and nothing says with which scales")
        self.names_read.add(scales)
        return self.reader.decode(found, super()._get_safetensor(scales), starts)

    def _name_remapping(self, module: Any, prefix: str, **options: Any) -> None:
        """It would round a router's bias, which megatron-core and the files have in float32."""
        if getattr(module, "expert_bias", None) is not None:
            options["dtype"] = torch.float32
        super()._name_remapping(module, prefix, **options)

    def _import_transformer_layer(
        self, layer: Any, layer_id: int, layer_pbar: Any, is_mtp: bool = False
    ) -> None:
        """The original knows no norms after attention and MLP, no gated delta nets, and no gate of
        the shared experts."""
        known = layer
        if isinstance(layer.self_attention, GatedDeltaNet):
            prefix = self._prefix("linear_attn").format(layer_id)
            delta_net_import.read(layer.self_attention, prefix, self.divided, self._get_safetensor)
            parts = {name: getattr(layer, name) for name in _BESIDE_ATTENTION}
            known = SimpleNamespace(self_attention=IdentityOp(), **parts)
        super()._import_transformer_layer(known, layer_id, layer_pbar, is_mtp=is_mtp)
        shared = getattr(layer.mlp, "shared_experts", None)
        if (gate := getattr(shared, "gate_weight", None)) is not None:
            self.rules["shared_experts.gate_weight"](gate, layer_id)
        for name, norm in post_norms.of(layer).items():
            self.rules[name](norm, layer_id)

    def _qkv_merging(
        self, module: Any, prefix: str, parallel_config: Any = None, **options: Any
    ) -> None:
        """The original knows no gates of an attention's output."""
        if module.config.attention_output_gate:
            get = partial(self._get_safetensor, parallel_config=parallel_config)
            delta_net_import.read_gated_qkv(module, prefix, get)
        else:
            super()._qkv_merging(module, prefix, parallel_config=parallel_config, **options)

    def _prefix(self, rule: str) -> str:
        """Of the tensors that a rule of this architecture is for."""
        found: str = all_mcore_hf_import_mapping[self.arch][rule].target_name_or_prefix
        return found

    def _unpack_name_remapping(
        self,
        module: Any,
        prefix: str,
        layer_type: str,
        inputs_first: bool = True,
        is_mtp: bool = False,
    ) -> None:
        """The original divides gate and up as if they were one, which ETP mixes up.

        A layer's experts are one tensor, [experts, in, out] or [experts, out, in], all gates before
        all ups.
        """
        experts = list(module.children())
        ranks = parallel_state.get_expert_tensor_parallel_world_size()
        rank = parallel_state.get_expert_tensor_parallel_rank()
        first = parallel_state.get_expert_model_parallel_rank() * len(experts)
        for number, expert in enumerate(experts, start=first):
            weight = self._of_expert(prefix, number, inputs_first)
            if layer_type == "linear_fc1":
                halves = (half.chunk(ranks)[rank] for half in weight.chunk(2))
                weight = torch.cat(list(halves))
            else:
                weight = weight.chunk(ranks, dim=1)[rank]
            parameter = getattr(expert, layer_type).weight
            if parameter.shape != weight.shape:
                raise ValueError(f"{prefix}: {weight.shape}, not {parameter.shape}")
            with torch.no_grad():
                parameter.copy_(weight)

    def _of_expert(self, prefix: str, number: int, inputs_first: bool) -> torch.Tensor:
        """An expert's weight, [out, in], of one tensor or of the expert's own."""
        if prefix in self.index:
            self.names_read.add(prefix)
            with self._rows(prefix) as whole:
                weight = whole[number : number + 1][0]
            return weight.T if inputs_first else weight
        stacked = families.FAMILIES[self.arch].stacked
        if stacked is None:
            raise KeyError(f"the source has no tensor {prefix}")
        is_gate = prefix.endswith(stacked.gate_up)
        whole, names = (
            (stacked.gate_up, stacked.one[:2]) if is_gate else (stacked.down, stacked.one[2:])
        )
        parent = f"{prefix.removesuffix(whole)}experts.{number}"
        return torch.cat([self._get_safetensor(f"{parent}.{name}.weight") for name in names])

    def _unpack_name_remapping_gpt_oss(
        self,
        module: Any,
        prefix: str,
        layer_type: str,
        parallel_config: Any = None,
        is_mtp: bool = False,
    ) -> None:
        """The original reads MXFP4 alone.

        A layer's experts are one tensor, [experts, in, out], and biases [experts, out]. Gate and up
        take turns there; megatron-core has all gates first.
        """
        weights = self._get_safetensor(prefix, parallel_config=parallel_config)
        biases = self._get_safetensor(f"{prefix}_bias", parallel_config=parallel_config)
        experts = list(module.children())
        if not len(weights) == len(biases) == len(experts):
            raise ValueError(f"{prefix} has {len(weights)} experts, the model {len(experts)}")
        for expert, weight, bias in zip(experts, weights.mT, biases, strict=True):
            linear = getattr(expert, layer_type)
            found = {"weight": weight, "bias": bias}
            if layer_type == "linear_fc1":
                found = {name: torch.cat([each[::2], each[1::2]]) for name, each in found.items()}
            with torch.no_grad():
                for name, value in found.items():
                    parameter = getattr(linear, name)
                    if parameter.shape != value.shape:
                        raise ValueError(f"{prefix}: {name} {value.shape}, not {parameter.shape}")
                    parameter.copy_(value)

    def _gated_mlp_merging(self, module: Any, *args: Any, **kwargs: Any) -> None:
        """It passes no _extra_state on to Transformer Engine's linears without a norm."""
        with module.register_load_state_dict_post_hook(_extra_state_may_be_missing):
            super()._gated_mlp_merging(module, *args, **kwargs)


def _extra_state_may_be_missing(module: torch.nn.Module, found: Any) -> None:
    found.missing_keys[:] = [key for key in found.missing_keys if "_extra_state" not in key]
