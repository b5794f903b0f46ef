"""quantize.py as a user runs it: refusals before the work, what it saves, prints and records."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import speed
import tools
import torch

from post_training.checkpoints import torch_dist
from post_training.common import files, manifest


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    tools.random_model(folder / "model", "qwen3", torch.bfloat16, num_hidden_layers=2)
    lines = [json.dumps({"text": f"Fact {i}: {i} plus {i} is {2 * i}."}) for i in range(60)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    return folder


def flags(source, save, *more):
    return (
        *("--pretrained-model-path", source / "model", "--save", save),
        *("--calib-dataset-path-or-name", source / "text.jsonl"),
        *("--calib-size", 2, "--calib-max-sequence-length", 64, "--generate-output-len", 4),
        *more,
    )


TP, PP = ("--tensor-model-parallel-size", 2), ("--pipeline-model-parallel-size", 2)
REFUSED = {
    "unknown name": (("--export-quant-cfg", "nvfp5"), "nvfp5", "Did you mean: nvfp4"),
    "int8 and keys in nvfp4": (
        ("--export-quant-cfg", "int8", "--export-kv-cache-quant", "nvfp4"),
        "--export-kv-cache-quant nvfp4",
        "NVFP4 keys and values beside INT8_W8A8",
    ),
    "auto with awq": (
        ("--export-quant-cfg", "auto", "--auto-quantize-formats", "nvfp4_awq_lite,fp8"),
        "nvfp4_awq_lite,fp8",
        "changes norms or weights",
    ),
    "weight-only fp8": (("--weight-only",), "--weight-only", "static input scale"),
    "kv alone": (("--export-quant-cfg", "FP8_KV_CFG"), "FP8_KV_CFG", "--allow-unexportable"),
    "affine kv": (("--export-kv-cache-quant", "fp8_affine"), "fp8_affine", "zero points"),
    "rotated kv": (("--export-kv-cache-quant", "nvfp4_rotate"), "nvfp4_rotate", "hadamard"),
    "svdquant": (
        ("--export-quant-cfg", "nvfp4_svdquant", "--allow-unexportable"),
        "nvfp4_svdquant",
        "low-rank",
    ),
    "experts of a dense model": (("--export-quant-cfg", "nvfp4_experts_only"), "nvfp4", "none"),
    "stored blocks at TP=2": (("--export-quant-cfg", "nvfp4_mse", *TP), "TP=2", "TP=1"),
    "auto at PP=2": (("--export-quant-cfg", "auto", *PP), "PP=2", "PP=1"),
    "auto with too few bits": (
        ("--export-quant-cfg", "auto", "--auto-quantize-bits", 3),
        "--auto-quantize-bits 3.0",
        "4.5",
    ),
    "auto with formats that no engine mixes": (
        ("--export-quant-cfg", "auto", "--auto-quantize-formats", "FP8_DEFAULT_CFG,mxfp8"),
        "FP8_DEFAULT_CFG,mxfp8",
        "does not mix",
    ),
    "recipe and name": (
        ("--recipe", "fp8_default-kv_fp8", "--export-quant-cfg", "fp8"),
        "--recipe",
        "one of them",
    ),
    "missing recipe": (("--recipe", "fp8_defalt-kv_fp8"), "fp8_defalt", "fp8_default-kv_fp8"),
    "kv cache name": (("--export-kv-cache-quant", "fp7"), "fp7", "fp8"),
    "no calibration": (("--calib-size", 0), "--calib-size 0", "less than 1"),
    "bits that are no number": (
        ("--auto-quantize-bits", "nan"),
        "--auto-quantize-bits nan",
        "not a finite number",
    ),
    "context parallelism": (("--context-parallel-size", 2), "CP=2", "CP=1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_mistakes_end_with_exit_code_2_and_one_message(source, tmp_path, case):
    given, what, hint = REFUSED[case]
    done = tools.run("quantize.py", "--check", *flags(source, tmp_path / "q", *given), code=2)
    assert what in done.stderr
    assert hint in done.stderr
    assert "Traceback" not in done.stderr
    assert "cause:" in done.stderr and "remedy:" in done.stderr


def test_replicas_whose_scales_would_differ_are_refused(source, tmp_path):
    words = flags(source, tmp_path / "q", "--export-quant-cfg", "nvfp4_local_hessian")
    done = tools.run("quantize.py", "--check", *words, code=2, MLM_PLANNED_PROCESSES="2")
    assert "DP=2" in done.stderr
    assert "set DP=1" in done.stderr


def test_a_refusal_takes_less_than_a_second_and_no_torch(source, tmp_path):
    words = flags(source, tmp_path / "q", "--export-quant-cfg", "nvfp4_svdquant")
    seconds = []
    for _ in range(3):
        started = time.monotonic()
        tools.run("quantize.py", *words, code=2)
        seconds.append(time.monotonic() - started)
    assert min(seconds) < speed.scaled(1)
    command = [sys.executable, "-X", "importtime", tools.ROOT / "quantize.py", *map(str, words)]
    done = subprocess.run(command, env=tools.environment(), capture_output=True, text=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "argparse" in imported
    assert not {"torch", "megatron.core", "modelopt"} & imported


def test_a_quantized_checkpoint_cannot_be_quantized_again(source, tmp_path):
    save = tmp_path / "q"
    tools.run("quantize.py", *flags(source, save, "--skip-generate"))
    again = ("--load", save, "--save", tmp_path / "again")
    data = ("--calib-dataset-path-or-name", source / "text.jsonl")
    done = tools.run("quantize.py", "--check", *again, *data, code=2)
    assert "already quantized: FP8_DEFAULT_CFG" in done.stderr


def test_the_stage_saves_records_and_prints_what_it_did(source, tmp_path):
    save = tmp_path / "q"
    more = ("--export-quant-cfg", "nvfp4_mlp_only", "--export-kv-cache-quant", "fp8")
    done = tools.run("quantize.py", *flags(source, save, *more, "--calib-batch-size", 2))
    content = manifest.read(save)
    assert manifest.damaged_outputs(save, content) == []
    assert torch_dist.is_quantized(save)
    assert (save / "huggingface" / "tokenizer.json").is_file()
    found = content["quantization"]
    assert found["format"] == "NVFP4_MLP_ONLY_CFG"
    assert found["exportable"]
    assert (found["quant_algo"], found["kv_cache_quant_algo"]) == ("NVFP4", "FP8")
    patterns = [entry["quantizer_name"] for entry in found["configuration"]["quant_cfg"]]
    assert {"*mlp*weight_quantizer", "*[kv]_bmm_quantizer"} <= set(patterns)
    used = content["metrics"]["calibration"]
    assert (used["sequences"], used["sequence_length"], used["tokens"]) == (2, 64, 128)
    assert used["tokens_per_second"] > 0
    (data,) = used["read"]
    assert data["sha256"] == files.sha256(Path(data["path"]))
    reached = content["metrics"]["coverage"]
    assert reached["quantizers"] == {"KV cache": 4, "input": 4, "weight": 4}
    assert reached["bits_per_quantized_weight"] == 4.5
    stored = tools.tensors(source / "model")
    assert reached["parameters"] == sum(tensor.numel() for _, tensor in stored)
    for text in ("2 linear_fc1, 2 linear_fc2: nvfp4 with nvfp4 inputs", "no pattern of the recipe",
                 "2 sequences of 64", "peak memory", str(save.name), "smoke generation: 'Hello!'",
                 "next: "):  # fmt: skip
        assert text in done.stderr


def test_a_failing_smoke_generation_keeps_the_checkpoint_and_the_exit_code(source, tmp_path):
    save = tmp_path / "q"
    done = tools.run("quantize.py", *flags(source, save), "--generate-output-len", 10**13)
    assert "the smoke generation failed" in done.stderr
    assert "is complete" in done.stderr
    content = manifest.read(save)
    assert content["quantization"]["quant_algo"] == "FP8"
    assert manifest.damaged_outputs(save, content) == []


def test_an_unexportable_format_runs_when_it_is_allowed(source, tmp_path):
    more = ("--export-quant-cfg", "mxfp6", "--allow-unexportable", "--skip-generate")
    done = tools.run("quantize.py", *flags(source, tmp_path / "q", *more))
    assert "export will refuse this checkpoint" in done.stderr
    content = manifest.read(tmp_path / "q")
    found = content["quantization"]
    assert not found["exportable"]
    assert "MXFP6" in found["reason"]
    assert content["warnings"] == [f"export will refuse this checkpoint: {found['reason']}"]


def test_an_unexportable_recipe_is_refused_before_calibration(source, tmp_path):
    recipe = ("--recipe", "general/ptq/nvfp4_mlp_weight_only")
    done = tools.run("quantize.py", *flags(source, tmp_path / "q", *recipe), code=2)
    assert "blocks of 32" in done.stderr
    assert not (tmp_path / "q").exists()


def test_recipes_search_and_packing_run_to_the_end(source, tmp_path):
    """A built-in recipe, a search by recipe and by flags, resumed from its file, and --compress."""
    kept = tmp_path / "sensitivity.pt"
    auto = ("--export-quant-cfg", "auto", "--auto-quantize-bits", 6)
    auto += ("--auto-quantize-checkpoint", kept)
    runs = {
        "recipe": ("--recipe", "nvfp4_default-kv_fp8"),
        "search": ("--recipe", "general/auto_quantize/nvfp4_fp8_at_5p4bits.yaml"),
        "auto": auto,
        "auto again": auto,
        "packed": ("--compress",),
    }
    shared = flags(source, "", "--skip-generate")
    jobs = [
        ("quantize", (*shared, *more, "--save", tmp_path / name)) for name, more in runs.items()
    ]
    tools.run_stages(*jobs)
    found = {name: manifest.read(tmp_path / name) for name in runs}
    algorithms = {name: each["quantization"]["quant_algo"] for name, each in found.items()}
    assert algorithms["recipe"] == "NVFP4"
    assert algorithms["packed"] == "FP8"
    assert algorithms["auto"] in ("FP8", "NVFP4", "MIXED_PRECISION")
    assert found["recipe"]["quantization"]["kv_cache_quant_algo"] == "FP8"
    assert found["auto"]["metrics"]["coverage"]["bits_per_quantized_weight"] <= 6
    assert found["search"]["metrics"]["search"]["effective_bits"] <= 5.4 + 1e-6
    assert (tmp_path / "sensitivity0.pt").is_file()  # ModelOpt keeps one for each rank
    assert found["auto again"]["metrics"]["search"] == found["auto"]["metrics"]["search"]


def test_the_result_does_not_depend_on_the_layout(source, tmp_path):
    """Calibrated at TP=2, at PP=2 and with two data-parallel ranks, loaded at TP=1."""
    layouts = {"TP=1": (1, ()), "TP=2": (2, TP), "PP=2": (2, PP), "DP=2": (2, ())}
    jobs = []
    for name, (processes, sizes) in layouts.items():
        save = tmp_path / name
        job = ("quantize", (*flags(source, save, "--skip-generate"), *sizes))
        tools.run_stages(job, processes=processes)
        jobs.append(tools.logits_job(tmp_path / f"{name} logits", tools.tokens(), "--load", save))
    tools.run_stages(*jobs)
    logits = {name: tools.read_logits(tmp_path / f"{name} logits") for name in layouts}
    # The same scales, up to bf16 rounding of activations that are summed in another order.
    assert torch.equal(logits["TP=1"], logits["PP=2"])
    assert torch.equal(logits["TP=1"], logits["DP=2"])
    spread = logits["TP=1"].std()
    assert (logits["TP=1"] - logits["TP=2"]).abs().mean() < 0.02 * spread
    ranges = {name: manifest.read(tmp_path / name)["metrics"]["ranges"] for name in layouts}
    weights = dict(tools.tensors(source / "model"))
    for layer in range(2):
        name, stored = (
            f"decoder.layers.{layer}.mlp.linear_fc2",
            f"model.layers.{layer}.mlp.down_proj",
        )
        largest = float(weights[f"{stored}.weight"].abs().max())
        assert {each[name]["weight"] for each in ranges.values()} == {largest}
        inputs = [each[name]["input"] for each in ranges.values()]
        assert inputs == pytest.approx([inputs[0]] * len(inputs), rel=0.02)
    assert len({frozenset(each) for each in ranges.values()}) == 1
