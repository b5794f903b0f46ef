"""Exports that were damaged: none is accepted by the read-back.

What has happened to users of any tool is done to a good folder of every layout (``KINDS``); what
only one layout can suffer is in ``DAMAGES``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import tools
import torch
from safetensors.torch import save_file

from post_training.cli import answer
from post_training.common.errors import UsageError
from post_training.export import comparison, computed_as, exported_weights, readback
from post_training.models.families import registry as families

SIZES = {
    **{"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "head_dim": 32},
    **{"num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": False},
}
INT4, INT8 = "INT4_BLOCKWISE_WEIGHT_ONLY_CFG", "INT8_DEFAULT_CFG"
SCALED_FP8 = ("FP8_PER_CHANNEL_PER_TOKEN_CFG", "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG")
TRTLLM, FOR_TRTLLM = "INT4 for TensorRT-LLM", ("--target", "trtllm")
MIXTURE = ("auto", "--auto-quantize-bits", 6, "--auto-quantize-formats", "int8_wo", INT4)
EXPERTS = {**SIZES, "num_experts": 2, "moe_intermediate_size": 256}
# What is exported: --export-quant-cfg and further flags; of a model with experts in the second.
LAYOUTS: dict[str, tuple[Any, ...]] = {
    **{name: (name,) for name in (INT4, INT8, *SCALED_FP8)},
    **{name: (name,) for name in ("FP8_DEFAULT_CFG", "MXFP8_DEFAULT_CFG", "MXFP4_DEFAULT_CFG")},
    "NVFP4_DEFAULT_CFG": ("NVFP4_DEFAULT_CFG", "--export-kv-cache-quant", "fp8"),
    TRTLLM: (INT4, *FOR_TRTLLM),
    "INT8 for TensorRT-LLM": ("INT8_WEIGHT_ONLY_CFG", *FOR_TRTLLM),
    "W4A8 for TensorRT-LLM": ("W4A8_AWQ_BETA_CFG", *FOR_TRTLLM),
    "a mixture": MIXTURE,
}
OF_EXPERTS: dict[str, tuple[Any, ...]] = {
    f"experts {name}": (name,)
    for name in (
        *("FP8_DEFAULT_CFG", "NVFP4_DEFAULT_CFG", "W4A8_FP8_AWQ_CFG", "MXFP4_DEFAULT_CFG"),
        "INT8_PER_CHANNEL_PER_TOKEN_CFG",
    )
}
MODULE = "model.layers.0.self_attn.q_proj"
EXPERT = "model.layers.0.mlp.experts.1.up_proj"
PLAIN = "model.layers.0.mlp.up_proj"
CONFIG = "config.json"

Tensors = dict[str, torch.Tensor]
Damage = Callable[[Tensors, dict[str, dict[str, Any]]], None]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The folder with a folder for each layout."""
    root = tmp_path_factory.mktemp("exports")
    tools.random_model(root / "model", "llama3", **SIZES)
    tools.random_model(root / "experts", "qwen3-moe", **EXPERTS)
    text = tools.write_texts(root / "text.jsonl")
    jobs = []
    for name, what in (LAYOUTS | OF_EXPERTS).items():
        flags = (
            *("--pretrained-model-path", root / ("experts" if name in OF_EXPERTS else "model")),
            *("--calib-dataset-path-or-name", text, "--calib-size", 4, "--skip-generate"),
            *("--calib-max-sequence-length", 64, "--fp32", "--export-dir", root / name),
        )
        jobs.append(("quantize", (*flags, "--export-quant-cfg", *what)))
    tools.run_stages(*jobs)
    return root


class Judge:
    """What the read-back finds in copies of a good folder, after each damage.

    Args:
        modules: linears whose weights and scales are compared with those of the good folder.
    """

    def __init__(self, source, folder, modules=(MODULE, PLAIN)):
        self.source, self.folder, self.good = source, folder, readback.Folder(source)
        names = [each for name in modules for each in (f"{name}.weight", f"{name}.input_scale")]
        kept = [each for each in names if each in self.good.expected or each in self.good.index]
        self.reference = [(each, self.good.dequantized(each)) for each in kept]
        plain = {k: v for k, v in self.good.config.items() if k != "quantization_config"}
        self.model = families.from_huggingface(plain)

    def problems(self, damage: Damage | None) -> list[str]:
        tensors = dict(tools.tensors(self.source))
        said = {p.name: json.loads(p.read_text()) for p in self.source.glob("*config.json")}
        if damage is not None:
            damage(tensors, said)
        save_file(
            {k: v.contiguous() for k, v in tensors.items()}, self.folder / "model.safetensors"
        )
        for old in self.folder.glob("*config.json"):
            old.unlink()
        for name, content in said.items():
            (self.folder / name).write_text(json.dumps(content))
        try:
            read = readback.Folder(self.folder)
            if read.config == self.good.config:
                read.expected = self.good.expected  # takes longest
            found = [*read.problems(), *computed_as.problems(read.config, self.model)]
            return [*found, *comparison.compare(read, self.reference, torch.float32)]
        except (KeyError, ValueError, UsageError) as error:
            return [repr(error)]


def problems_of(source, folder, damage: Damage | None) -> list[str]:
    return Judge(source, folder).problems(damage)


def changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    """A tensor of ``MODULE`` is another."""

    def damage(tensors: Tensors, _said: Any) -> None:
        tensors[f"{MODULE}.{name}"] = change(tensors[f"{MODULE}.{name}"].clone())

    return damage


def first(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[0] = value
        return tensor

    return change


def without(name: str) -> Damage:
    def damage(tensors: Tensors, _said: Any) -> None:
        del tensors[f"{MODULE}.{name}"]

    return damage


def added(name: str, value: torch.Tensor) -> Damage:
    return lambda tensors, _: tensors.update({f"{MODULE}.{name}": value})


def of_weights(**changes: int) -> Damage:
    """What compressed-tensors says about the weights is otherwise."""

    def damage(_tensors: Tensors, said: Any) -> None:
        groups = said[CONFIG]["quantization_config"]["config_groups"]
        groups["group_0"]["weights"].update(changes)

    return damage


def of_ignored(change: Callable[[list[str]], None]) -> Damage:
    return lambda _, said: change(said[CONFIG]["quantization_config"]["ignore"])


def of_modelopts(**changes: Any) -> Damage:
    return lambda _, said: said[readback.QUANT_CONFIG]["quantization"].update(changes)


def one_plain(tensors: Tensors, _said: Any) -> None:
    for kind in ("packed", "scale", "shape"):
        del tensors[f"{PLAIN}.weight_{kind}"]
    tensors[f"{PLAIN}.weight"] = torch.ones(512, 256)


def excluded(_tensors: Tensors, said: Any) -> None:
    said[readback.QUANT_CONFIG]["quantization"]["exclude_modules"].append(MODULE)


def beside(_tensors: Tensors, said: Any) -> None:
    said[readback.QUANT_CONFIG] = {"quantization": {"quant_algo": "FP8"}}


SCALE, NOT_FINITE = "weight_scale", "not finite and positive"
_OTHER_SHAPE = torch.tensor([64, 128])
IN_FP8: dict[str, tuple[Damage, str]] = {
    "zero": (changed(SCALE, first(0)), NOT_FINITE),
    "input scale": (added("input_scale", torch.ones(())), "input_scale is no tensor of FP8"),
    "a column": (changed(SCALE, lambda each: each.reshape(-1, 1)), "scale of shape"),
    "bfloat16": (changed(SCALE, torch.Tensor.bfloat16), "stored as torch.bfloat16"),
    "excluded": (excluded, "configuration calls unquantized"),
}
DAMAGES: dict[str, dict[str, tuple[Damage, str]]] = {
    INT4: {
        "no scale": (without(SCALE), "q_proj.weight is missing"),
        "zero": (changed(SCALE, first(0)), NOT_FINITE),
        "nan": (changed(SCALE, first(float("nan"))), NOT_FINITE),
        "inf": (changed(SCALE, first(float("inf"))), NOT_FINITE),
        "no codes": (without("weight_packed"), "weight_packed is missing"),
        "a code": (changed("weight_packed", lambda each: each ^ 1), "differs from the model's"),
        "other shape": (changed("weight_shape", lambda _: _OTHER_SHAPE), "weight_shape"),
        "ignored": (of_ignored(lambda names: names.append(MODULE)), "is missing"),
        "plain": (one_plain, "does not exclude it"),
        "head": (of_ignored(lambda names: names.remove("lm_head")), "lm_head is plain, but"),
        "unknown": (added("weight_zero_point", torch.ones(1)), "no tensor of this architecture"),
        "group": (of_weights(group_size=64), "none that is exported"),
        "bits": (of_weights(num_bits=8), "none that is exported"),
    },
    INT8: {"two configurations": (beside, "stands beside")},
    **dict.fromkeys(SCALED_FP8, IN_FP8),
    TRTLLM: {
        "no scale": (without(SCALE), "not said to be quantized"),
        "zero": (changed(SCALE, first(0)), NOT_FINITE),
        "no factors": (without("pre_quant_scale"), "pre_quant_scale is missing"),
        "factors": (changed("pre_quant_scale", first(1.5)), "multiplies its inputs"),
        "rows": (changed("weight", lambda each: each.repeat_interleave(2, 0)), "has shape"),
        "a code": (changed("weight", lambda each: each ^ 1), "differs from the model's"),
        "group": (of_modelopts(group_size=64), "has blocks of 128"),
    },
}


def kinds_of(tensors: Tensors, said: Any, module: str) -> dict[str, Damage]:
    """Damages that any layout may suffer, of a linear and of the whole folder."""
    found: dict[str, Damage] = {}
    own = {
        key.rpartition(".")[2]: each
        for key, each in tensors.items()
        if key.startswith(f"{module}.")
    }
    for kind, value in own.items():
        found[f"no {kind}"] = lambda t, _, kind=kind: t.pop(f"{module}.{kind}")
        found[f"{kind} of another shape"] = _of(module, kind, lambda each: each.flatten()[:-1])
        if "scale" not in kind or "pre_quant" in kind:
            continue
        bad = {"nan": float("nan"), "negative": -1.0}
        if value.dtype == torch.uint8:
            bad = {"nan": 255}
        elif value.dtype != torch.float8_e4m3fn:  # where a block of zeros has a zero
            bad |= {"zero": 0.0, "infinite": float("inf")}
        for how, number in bad.items():
            found[f"{kind} {how}"] = _of(module, kind, _first(number))
        found[f"another {kind}"] = _of(module, kind, lambda each: (each.float() * 2).to(each.dtype))
    ends = "lm_head" if "lm_head.weight" in tensors else ""
    copies = {f"{ends}.{kind}": value for kind, value in own.items()}
    found["a quantized output layer"] = lambda t, _: t.update(copies)
    found["an output layer said to be quantized"] = lambda _, s: _said_to_be_quantized(s, "lm_head")
    found["scales of an excluded module"] = lambda _, s: _ignored(s).append(module)
    found["one of the fused in 16 bits"] = lambda t, s: _plain(t, s, module)
    found["an unknown tensor"] = lambda t, _: t.update({f"{module}.weight_zeros": torch.ones(1)})
    found["an unknown layer"] = lambda t, _: t.update({"model.layers.9.norm.weight": torch.ones(1)})
    found["a norm lost"] = lambda t, _: t.pop("model.layers.1.input_layernorm.weight")
    found["two dtypes"] = lambda _, s: s[CONFIG].update(dtype="float32", torch_dtype="float32")
    found["another epsilon"] = lambda _, s: s[CONFIG].update(rms_norm_eps=0.01)
    found["other heads"] = lambda _, s: s[CONFIG].update(num_attention_heads=4, head_dim=64)
    if readback.QUANT_CONFIG in said:
        found["no configuration beside"] = lambda _, s: s.pop(readback.QUANT_CONFIG)
        found["another algorithm"] = of_modelopts(quant_algo="NVFP4_AWQ")
        found["other groups"] = of_modelopts(group_size=64)
        found["a cache said or not"] = of_modelopts(
            kv_cache_quant_algo=None if any(each.endswith("k_scale") for each in tensors) else "FP8"
        )
    else:
        found["two configurations"] = beside
        found["other groups"] = of_weights(group_size=64)
        found["another layout"] = of_layout("naive-quantized")
    return found


def _of(module: str, kind: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    key = f"{module}.{kind}"
    return lambda tensors, _: tensors.update({key: change(tensors[key].clone())})


def _first(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(each: torch.Tensor) -> torch.Tensor:
        flat = each.float().flatten()
        flat[0] = value
        return flat.view_as(each).to(each.dtype)

    return change


def _ignored(said: Any) -> list[str]:
    if readback.QUANT_CONFIG in said:
        return said[readback.QUANT_CONFIG]["quantization"]["exclude_modules"]
    return said[CONFIG]["quantization_config"]["ignore"]


def _said_to_be_quantized(said: Any, module: str) -> None:
    _ignored(said).remove(module)
    groups = said[CONFIG]["quantization_config"].get("config_groups", {})
    if len(groups) > 1:  # a mixture, which lists its linears
        groups["group_0"]["targets"].append(module)


def _plain(tensors: Tensors, said: Any, module: str) -> None:
    rows, columns = (256, 256)
    for key in [key for key in tensors if key.startswith(f"{module}.")]:
        del tensors[key]
    tensors[f"{module}.weight"] = torch.ones(rows, columns)
    _ignored(said).append(module)


def of_layout(name: str) -> Damage:
    def damage(_tensors: Tensors, said: Any) -> None:
        declared = said[CONFIG]["quantization_config"]
        declared["format"] = declared["config_groups"]["group_0"]["format"] = name

    return damage


@pytest.mark.parametrize("name", [*LAYOUTS, *OF_EXPERTS])
def test_what_happens_to_any_layout_is_seen(exported, tmp_path, name):
    modules = (MODULE, EXPERT) if name in OF_EXPERTS else (MODULE,)
    judge = Judge(exported / name, tmp_path, modules)
    assert judge.problems(None) == []
    tensors = dict(tools.tensors(exported / name))
    said = {path.name: None for path in (exported / name).glob("*config.json")}
    accepted = [
        f"{what} of {module}"
        for module in modules
        for what, damage in kinds_of(tensors, said, module).items()
        if not judge.problems(damage)
    ]
    assert accepted == []


@pytest.mark.parametrize(
    ("name", "what"), [(name, what) for name, found in DAMAGES.items() for what in found]
)
def test_a_damaged_folder_is_not_accepted(exported, tmp_path, name, what):
    damage, expected = DAMAGES[name][what]
    problems = Judge(exported / name, tmp_path).problems(damage)
    assert any(expected in each for each in problems), problems


@pytest.mark.parametrize("name", [INT8, *SCALED_FP8, TRTLLM])
def test_a_damaged_scale_is_no_weight_to_evaluate(exported, tmp_path, name):
    """An engine would compute with the scale of inputs too, and evaluate does not."""
    kinds = ["weight_scale", *(["input_scale"] if name == INT8 else [])]
    for kind in kinds:
        problems_of(exported / name, tmp_path, changed(kind, first(-1.0)))
        opened = exported_weights.open_export(tmp_path)
        opened.read(f"{PLAIN}.weight")
        with pytest.raises(ValueError, match=f"{kind} is not finite and positive"):
            opened.read(f"{MODULE}.weight")


def not_a_number(tensors: Tensors, _said: Any) -> None:
    tensors["model.norm.weight"][0] = torch.nan


def of_no_form(_tensors: Tensors, said: dict[str, dict[str, Any]]) -> None:
    said["hf_quant_config.json"] = {"quantization": {"exclude_modules": [None]}}


def test_an_answer_is_of_sound_values_that_are_as_recorded(exported, tmp_path, capsys):
    """``python -m post_training.answer`` calls them verified."""
    source = exported / TRTLLM
    shutil.copytree(source, tmp_path / "x")
    folder = tmp_path / "x"
    assert not answer._verified(folder).problems()
    problems_of(source, folder, not_a_number)
    with pytest.raises(SystemExit, match="1"):
        answer._verified(folder)
    said = capsys.readouterr().err
    assert "model.norm.weight has values that are not finite" in said
    assert "model.safetensors is not what run.json says" in said
    (folder / "run.json").unlink()
    problems_of(source, folder, of_no_form)
    with pytest.raises(SystemExit, match="2"):
        answer._verified(folder)
