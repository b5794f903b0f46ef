"""quantize.py --layerwise: the folder that the whole model gives, whatever happens on the way."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time

import pytest
import tools
import torch

from post_training.common import files, manifest

# By what is special: family, format, further flags.
CASES = {
    "max": ("llama3", "FP8_DEFAULT_CFG", ("--export-kv-cache-quant", "fp8")),
    "a plain layer": ("llama3", "FP8_DEFAULT_CFG", ("--leave-out", "decoder.layers.2.*")),
    "many files": ("qwen3", "NVFP4_DEFAULT_CFG", ("--max-shard-size", 0.00005)),
    "experts": ("qwen3-moe", "FP8_DEFAULT_CFG", ("--moe-calibrate", "all")),
    "latent attention": ("deepseek-v3", "NVFP4_MLP_ONLY_CFG", ()),
    "no data": ("qwen3", "MXFP4_DEFAULT_CFG", ()),
    "one pass more": ("qwen3", "INT8_SMOOTHQUANT_CFG", ("--leave-out", "decoder.layers.0.*")),
    "two passes more": ("qwen3", "INT4_AWQ_CFG", ()),
    "its own passes": ("qwen3", "INT4_GPTQ_CFG", ("--calib-batch-size", 2)),
}
REPLICATED = ("max", "experts", "its own passes")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    for family in {family for family, _, _ in CASES.values()}:
        tied = {"tie_word_embeddings": True} if family == "llama3" else {}
        tools.random_model(folder / family, family, torch.bfloat16, **tied)
    lines = [json.dumps({"text": f"Fact {i}: {i} plus {i} is {2 * i}."}) for i in range(60)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    return folder


def words(source, case, folder, *more):
    family, name, flags = CASES[case]
    return (
        *("--pretrained-model-path", source / family, "--export-quant-cfg", name, *flags),
        *("--calib-dataset-path-or-name", source / "text.jsonl", "--skip-generate"),
        *("--calib-size", 5, "--calib-max-sequence-length", 64, "--export-dir", folder, *more),
    )


def jobs(source, root, cases):
    """Each case by layers and whole."""
    for case in cases:
        yield "quantize", words(source, case, root / f"{case} by layers", "--layerwise")
        yield "quantize", words(source, case, root / f"{case} whole")


def texts(source, root):
    """Evaluations of text, whole and by layers: of one model, and of an export and its original."""
    one = ("--pretrained-model-path", source / "qwen3")
    two = ("--pretrained-model-path", root / "max whole", "--reference", source / "llama3")
    data = ("--text", source / "text.jsonl", "--text-window", 48, "--text-batch-size", 3)
    for name, models in (("one", one), ("two", two)):
        for how, more in (("whole", ()), ("by layers", ("--layerwise",))):
            output = ("--evaluate-output", root / f"{name} {how}.json")
            yield "evaluate", (*models, *data, *output, *more)


def require_same(root, case, how="by layers"):
    by_layers, whole = root / f"{case} {how}", root / f"{case} whole"
    found, wanted = dict(tools.tensors(by_layers)), dict(tools.tensors(whole))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(as_bytes(found[name]), as_bytes(tensor)), name
    # Files of weights may be others: there is at least one a layer.
    assert small_files(by_layers) == small_files(whole)
    one, other = manifest.read(by_layers), manifest.read(whole)
    assert one["quantization"] == other["quantization"]
    for content in (one, other):
        for name in ("seconds", "tokens_per_second", "sequences_at_a_time"):
            del content["metrics"]["calibration"][name]
    assert one["metrics"] == other["metrics"]
    assert not files.incomplete(by_layers).exists()


def as_bytes(tensor):
    return tensor.reshape(-1).contiguous().view(torch.uint8)


def small_files(folder):
    skipped = (manifest.FILE, "README.md", "model.safetensors.index.json")
    paths = [path for path in files.tree(folder) if path.suffix != ".safetensors"]
    return {path.name: path.read_bytes() for path in paths if path.name not in skipped}


def killed(source, case, folder):
    """Start a case by layers, and kill it with SIGKILL once a layer's state is recorded.

    A slow disk may record the first state when the last layer is done: then it is started again.
    """
    records = files.incomplete(folder) / "layers"
    for _ in range(5):
        process = subprocess.Popen(
            tools.command("quantize.py", *words(source, case, folder, "--layerwise")),
            cwd=tools.ROOT,
            env=tools.environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        while not any(records.glob("reached-0-[1-7].json")) and process.poll() is None:
            time.sleep(0.002)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if not folder.exists():
            return
        shutil.rmtree(folder)
    raise AssertionError("it was never killed on its way")


def test_the_folder_is_the_whole_models_bit_for_bit_and_goes_on_after_a_kill(source, tmp_path):
    killed(source, "two passes more", tmp_path / "two passes more by layers")
    case, converted = "two passes more", tmp_path / "converted"
    of_checkpoint = words(source, case, tmp_path / f"{case} of a checkpoint", "--layerwise")
    done = tools.run_stages(
        *jobs(source, tmp_path, CASES),
        ("convert", ("--pretrained-model-path", source / CASES[case][0], "--save", converted)),
        ("quantize", (*of_checkpoint, "--load", converted)),
        *texts(source, tmp_path),
    )
    for name in ("one", "two"):
        whole, layers = (tmp_path / f"{name} {how}.json" for how in ("whole", "by layers"))
        found, wanted = (json.loads(path.read_text())["text"] for path in (layers, whole))
        assert found == wanted and wanted["tokens"] > 400
    assert done.stderr.count("going on after") == 1
    require_same(tmp_path, case, "of a checkpoint")
    for case in CASES:
        require_same(tmp_path, case)
    assert len(list((tmp_path / "many files by layers").glob("*.safetensors"))) > 12


def test_replicas_share_the_data(source, tmp_path):
    tools.run_stages(*jobs(source, tmp_path, REPLICATED), processes=2)
    for case in REPLICATED:
        require_same(tmp_path, case)


REFUSED = {
    "a checkpoint": (("--save", "{out}-mlm"), "--save"),
    "no folder": (("--export-dir", ""), "--export-dir"),
    "pipeline stages": (("--pipeline-model-parallel-size", 2), "PP=2"),
    "packed weights": (("--compress",), "--compress"),
    "a search": (("--export-quant-cfg", "auto"), "a search of formats"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_needs_the_whole_model_is_refused(source, case, tmp_path):
    more, expected = REFUSED[case]
    more = (str(each).format(out=tmp_path / "hf") for each in more)
    line = words(source, "max", tmp_path / "hf", "--layerwise", *more)
    done = tools.run("quantize.py", *line, "--check", code=2)
    assert "--layerwise" in done.stderr and expected in done.stderr
