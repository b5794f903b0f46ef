"""quantize.py --export-dir: the folder that two processes make, and what it refuses."""

import json

import pytest
import tools
import torch

from post_training.common import files, manifest, validity

CASES = {
    "fp8": ("qwen3", "FP8_DEFAULT_CFG", ("--export-kv-cache-quant", "fp8")),
    "packed": ("qwen3", "NVFP4_DEFAULT_CFG", ("--compress", "--max-shard-size", 0.001)),
    "folded": ("qwen3", "INT8_SMOOTHQUANT_CFG", ()),
    "experts": ("deepseek-v3", "FP8_DEFAULT_CFG", ()),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    for family in {family for family, _, _ in CASES.values()}:
        tools.random_model(folder / family, family, torch.bfloat16)
    lines = [json.dumps({"text": f"Fact {i}: {i} plus {i} is {2 * i}."}) for i in range(60)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    return folder


def words(source, case, *more):
    family, name, flags = CASES[case]
    return (
        *("--pretrained-model-path", source / family, "--export-quant-cfg", name, *flags),
        *("--calib-dataset-path-or-name", source / "text.jsonl", "--skip-generate"),
        *("--calib-size", 4, "--calib-max-sequence-length", 64, *more),
    )


def contents(folder):
    """Hash of each file, but for the record of the run, and the card without the folder's name."""
    found = {
        each["file"]: each["xxh3_128"]
        for each in files.describe_tree(folder, skip=frozenset({manifest.FILE, "README.md"}))
    }
    card = (folder / "README.md").read_text().replace("\\", "")
    assert folder.name in card and "quantized" in card
    return {**found, "card": card.replace(folder.name, "name")}


@pytest.mark.parametrize("layout", ["TP=1", "PP=2", "DP=2"])
def test_the_folder_is_the_one_of_two_processes_bit_for_bit(source, layout, tmp_path):
    processes, sizes = tools.LAYOUTS[layout] if layout != "DP=2" else (2, ())
    cases = CASES if processes == 1 else ["fp8"]
    at_once = [
        ("quantize", words(source, case, "--export-dir", tmp_path / f"{case}_1", *sizes))
        for case in cases
    ]
    saved = [
        ("quantize", words(source, case, "--save", tmp_path / f"{case}_mlm", *sizes))
        for case in cases
    ]
    tools.run_stages(*at_once, *saved, processes=processes)
    shards = {"packed": ("--max-shard-size", 0.001)}
    exported = [
        ("export", ("--load", tmp_path / f"{case}_mlm", "--export-dir", tmp_path / f"{case}_2",
                    *shards.get(case, ()), *sizes))
        for case in cases
    ]  # fmt: skip
    tools.run_stages(*exported, processes=processes if sizes else 1)
    for case in cases:
        one, two = contents(tmp_path / f"{case}_1"), contents(tmp_path / f"{case}_2")
        assert "config.json" in one
        assert one == two, case
        assert not (tmp_path / f"{case}_1.incomplete").exists()


def test_the_manifest_names_the_source_and_what_was_done(source, tmp_path):
    both = ("--export-dir", tmp_path / "hf", "--save", tmp_path / "mlm")
    done = tools.run("quantize.py", *words(source, "fp8", *both))
    content = manifest.read(tmp_path / "hf")
    assert content["stage"] == "export"
    (model,) = [each for each in content["inputs"] if each["role"] == "model"]
    assert model["listing_sha256"] == files.listing_sha256(source / "qwen3")
    assert content["quantization"]["format"] == "FP8_DEFAULT_CFG"
    assert content["metrics"]["calibration"]["tokens"] == 256
    assert content["metrics"]["tensors_compared"] > 0
    for made_from in (source / "qwen3", tmp_path / "mlm"):
        assert validity.is_valid(tmp_path / "hf", str(made_from))
    saved = manifest.read(tmp_path / "mlm")
    assert saved["stage"] == "quantize"
    assert saved["quantization"] == content["quantization"]
    for text in ("read back", "exported", "checkpoint", f"vllm serve {tmp_path / 'hf'}"):
        assert text in done.stderr
    again = tools.run("quantize.py", *words(source, "fp8", "--export-dir", tmp_path / "hf"), code=2)
    assert "--overwrite" in again.stderr


REFUSED = {
    "TP": (("--tensor-model-parallel-size", 2), "TP=2", "run export.sh"),
    "format": (("--export-quant-cfg", "fp8_kv"), "fp8_kv", "--allow-unexportable"),
    "both in one place": (("--save", "{out}"), "the same file", "another place"),
    "one in the other": (("--save", "{out}/mlm"), "a part of the other", "beside each other"),
    "the other in one": (("--save", "{out}/.."), "a part of the other", "beside each other"),
    "nothing to make": (("--export-dir", ""), "--save (not given)", "EXPORT_DIR"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_export_refuses_is_refused_before_calibration(source, case, tmp_path):
    more, *expected = REFUSED[case]
    more = (str(each).format(out=tmp_path / "hf") for each in more)
    line = words(source, "fp8", "--export-dir", tmp_path / "hf", *more)
    done = tools.run("quantize.py", *line, "--check", code=2)
    for text in expected:
        assert text in done.stderr
