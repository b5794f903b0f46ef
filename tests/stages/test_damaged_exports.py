"""Exports of integers and of scaled FP8 that were damaged: none is accepted by the read-back."""

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
from post_training.export import comparison, exported_weights, readback

SIZES = {
    **{"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "head_dim": 32},
    **{"num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": False},
}
INT4, INT8 = "INT4_BLOCKWISE_WEIGHT_ONLY_CFG", "INT8_DEFAULT_CFG"
SCALED_FP8 = ("FP8_PER_CHANNEL_PER_TOKEN_CFG", "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG")
TRTLLM = "INT4 for TensorRT-LLM"
MODULE = "model.layers.0.self_attn.q_proj"
PLAIN = "model.layers.0.mlp.up_proj"
CONFIG = "config.json"

Tensors = dict[str, torch.Tensor]
Damage = Callable[[Tensors, dict[str, dict[str, Any]]], None]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The folder with a folder for each format."""
    root = tmp_path_factory.mktemp("exports")
    tools.random_model(root / "model", "llama3", **SIZES)
    text = tools.write_texts(root / "text.jsonl")
    jobs = []
    for name in (INT4, INT8, *SCALED_FP8, TRTLLM):
        what = (INT4, "--target", "trtllm") if name == TRTLLM else (name,)
        flags = (
            *("--pretrained-model-path", root / "model", "--fp32", "--skip-generate"),
            *("--calib-dataset-path-or-name", text, "--calib-size", 4),
            *("--calib-max-sequence-length", 64, "--export-dir", root / name),
        )
        jobs.append(("quantize", (*flags, "--export-quant-cfg", *what)))
    tools.run_stages(*jobs)
    return root


def problems_of(source, folder, damage: Damage | None) -> list[str]:
    """What the read-back finds in a copy of a folder after ``damage``."""
    good = readback.Folder(source)
    reference = [(f"{each}.weight", good.dequantized(f"{each}.weight")) for each in (MODULE, PLAIN)]
    tensors = dict(tools.tensors(source))
    said = {path.name: json.loads(path.read_text()) for path in source.glob("*config.json")}
    if damage is not None:
        damage(tensors, said)
    save_file(tensors, folder / "model.safetensors")
    for name, content in said.items():
        (folder / name).write_text(json.dumps(content))
    try:
        read = readback.Folder(folder)
        return [*read.problems(), *comparison.compare(read, reference, torch.float32)]
    except ValueError as error:
        return [str(error)]


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


@pytest.mark.parametrize("name", DAMAGES)
def test_a_sound_folder_has_no_problems(exported, tmp_path, name):
    assert problems_of(exported / name, tmp_path, None) == []


@pytest.mark.parametrize(
    ("name", "what"), [(name, what) for name, found in DAMAGES.items() for what in found]
)
def test_a_damaged_folder_is_not_accepted(exported, tmp_path, name, what):
    damage, expected = DAMAGES[name][what]
    problems = problems_of(exported / name, tmp_path, damage)
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
    other = json.dumps({"quantization": {"exclude_modules": [None]}})
    (folder / "hf_quant_config.json").write_text(other)
    with pytest.raises(SystemExit, match="2"):
        answer._verified(folder)
