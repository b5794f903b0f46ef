"""The search stage: its figures are those of the single stages, it resumes, it keeps a budget."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import time
from types import SimpleNamespace

import launchers
import pytest
import speed
import tools
import warm

import search
from post_training.cli.stage import make_plan
from post_training.common import files, manifest, safetensors_index
from post_training.common.errors import UsageError
from post_training.search import report

FORMATS = ("fp8", "int8_smoothquant", "int4_gptq")
LAYOUTS = {"TP=2": ("auto", "mix-6"), "PP=2": ("fp8", "fp8")}


def flags(setting, folder, *more: object) -> tuple[object, ...]:
    data = setting.model / "data"
    return (
        *("--pretrained-model-path", setting.model, "--search-dir", folder, "--gpu", "hopper"),
        *("--text", data / "chat_heldout.jsonl", "--text-batch-size", 8, "--text-tokens", 500),
        *("--calib-dataset", data / "chat.jsonl", "--calib-size", 8),
        *("--calib-max-sequence-length", 64, "--conf", "quickstart/tiny", *more),
    )


@pytest.fixture(scope="module")
def setting(tiny_model, tmp_path_factory):
    """A search that was interrupted, and then finished by the same command."""
    work = tmp_path_factory.mktemp("search")
    found = SimpleNamespace(model=tiny_model, folder=work / "found")
    found.flags = flags(
        found, found.folder, "--max-size", "1.8MB", "--max-kl", 0.02, "--cache-tokens", 50,
        "--search-formats", *FORMATS, "--search-kv-caches", "none", "fp8", "--search-bits", 5.5, 7,
    )  # fmt: skip
    line = warm.command(tools.ROOT / "search.py", *map(str, found.flags))
    process = subprocess.Popen(line, cwd=tools.ROOT, env=tools.environment())
    deadline = time.monotonic() + speed.scaled(120)
    while len(trials(found.folder)) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait(speed.scaled(60)) == 128 + signal.SIGINT
    found.before = trials(found.folder)
    found.done = tools.run("search.py", *found.flags)
    found.content = manifest.read(found.folder / "search.json")
    return found


def trials(folder):
    """The manifest of each finished trial, by name."""
    return {path.parent.name: path.read_bytes() for path in folder.glob("trials/[!.]*/run.json")}


def by_name(content):
    return {each["name"]: each for each in content["trials"]}


def test_an_interrupted_search_continues(setting):
    assert 2 <= len(setting.before) < len(by_name(setting.content))
    after = trials(setting.folder)
    assert setting.before.items() <= after.items()
    assert setting.done.stderr.count("as measured before") == len(setting.before)
    assert setting.done.stderr.count("is measured\n") == len(after) - len(setting.before)
    for each in after.values():
        content = json.loads(each)
        assert content["stage"] == "search"
        assert {"model", "reference", "text", "calibration data"} <= {
            entry["role"] for entry in content["inputs"]
        }


def test_the_front_is_as_good_as_every_format(setting):
    found = by_name(setting.content)
    best = [each for each in found.values() if each["on_front"]]
    for each in found.values():
        size = each["bytes"] + each["cache_bytes"]
        assert any(
            other["bytes"] + other["cache_bytes"] <= size
            and other["text"]["kl"]["mean"] <= each["text"]["kl"]["mean"]
            for other in best
        )
    # Between the sizes of single formats a mixture is the best.
    assert any(each["trial"]["bits"] for each in best)
    assert found["int4_gptq"]["bytes"] < found["mix-7"]["bytes"] < found["fp8"]["bytes"]
    # Of a token a layer keeps 2 x 2 x 64 elements.
    assert found["fp8"]["cache_bytes"] == 6 * 256 * 2 * 50
    assert found["fp8+kv-fp8"]["cache_bytes"] == 6 * 256 * 50


def test_the_figures_are_those_of_the_stages(setting, tmp_path):
    """Its recommended command, and those of all trials, make what was measured."""
    plan = make_plan(search.STAGE, list(map(str, setting.flags)))
    lines = {each.name: report.command(plan.options, each) for each in plan.space.trials}
    recommended = setting.content["recommended"]
    assert recommended["command"] == lines[recommended["name"]]
    assert recommended["command"] in setting.done.stdout
    kept = ("fp8+kv-fp8", "int8_smoothquant", "int4_gptq", "mix-7")
    jobs = []
    for name in kept:
        words = stage_words(lines[name], tmp_path)
        export, saved, judged = (tmp_path / f"{name}{end}" for end in (".hf", ".mlm", ".json"))
        words += ["--export-dir", export, "--save", saved, "--skip-generate"]
        jobs.append(("quantize", words))
        jobs.append(("evaluate", evaluation(setting, saved, judged)))
    tools.run_stages(*jobs)
    for name in kept:
        trial = by_name(setting.content)[name]
        text = files.read_json(tmp_path / f"{name}.json")["text"]
        assert trial["text"] == text, name
        tensors = safetensors_index.read(tmp_path / f"{name}.hf").values()
        assert trial["bytes"] == sum(each.bytes for each in tensors), name
        exported = manifest.read(tmp_path / f"{name}.hf")["metrics"]
        assert trial["bits_per_weight"] == pytest.approx(exported["bits_per_weight"], rel=1e-3)


def stage_words(line: str, tmp_path) -> list[object]:
    """What the launcher of a recommended command starts the stage with."""
    words = shlex.split(line)
    variables = dict(each.split("=", 1) for each in words[: words.index("bash")])
    script, *rest = words[words.index("bash") + 1 :]
    environment = {**launchers.environment(tmp_path), **variables, "MLM_LAUNCH": "words"}
    done = launchers.bash(tools.ROOT / script, *rest, **environment)
    _, *found = done.stdout.split("\0")[:-1]
    return list(found)


def evaluation(setting, model, output, *sizes: object) -> list[object]:
    data = setting.model / "data"
    return [
        *("--load", model, "--reference", setting.model, "--evaluate-output", output, *sizes),
        *("--text", data / "chat_heldout.jsonl", "--text-batch-size", 8, "--text-tokens", 500),
    ]


def test_another_budget_measures_nothing_again(setting):
    """And bits between those that meet the divergence and those that do not are tried."""
    kl = {name: each["text"]["kl"]["mean"] for name, each in by_name(setting.content).items()}
    assert kl["mix-5.5"] > kl["mix-7"]
    most = (kl["mix-5.5"] + kl["mix-7"]) / 2
    more = ("--search-formats", "fp8", "--search-bits", 5.5, 7, "--search-rounds", 1)
    again = tools.run(
        "search.py", *flags(setting, setting.folder, *more, "--max-kl", most, "--log-level", "info")
    )
    assert again.stderr.count("as measured before") == 3
    assert again.stderr.count("is measured\n") == 1
    content = manifest.read(setting.folder / "search.json")
    assert {"mix-6.25", "fp8"} <= by_name(content).keys()
    chosen = by_name(content)[content["recommended"]["name"]]
    small = [each for each in content["trials"] if each["text"]["kl"]["mean"] <= most]
    assert chosen["bytes"] == min(each["bytes"] for each in small)
    page = (setting.folder / "report.html").read_text()
    assert "mix-6.25" in page and "Recommended" in page
    missed = tools.run(
        "search.py",
        *flags(setting, setting.folder, *more, "--max-kl", 1e-9),
        code=1,
    )
    assert "no trial is within the budget" in missed.stderr
    assert manifest.read(setting.folder / "search.json")["passed"] is False


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_measure_what_the_stages_do(setting, layout, tmp_path):
    processes, sizes = tools.LAYOUTS[layout]
    more = ("--search-formats", "fp8", "--max-kl", 1, "--search-bits", 6, *sizes)
    data = setting.model / "data"
    calibration = (
        *("--calib-dataset", data / "chat.jsonl", "--calib-size", 8),
        *("--calib-max-sequence-length", 64, "--pretrained-model-path", setting.model),
    )
    name, trial = LAYOUTS[layout]
    saved, judged = tmp_path / "saved", tmp_path / "judged.json"
    words = ("--export-quant-cfg", name, "--auto-quantize-bits", 6)[: 2 if name == "fp8" else 4]
    also, more = tmp_path / "also", (*more, "--also", tmp_path / "also")
    tools.run_stages(
        ("convert", ("--pretrained-model-path", setting.model, "--save", also, *sizes)),
        ("search", flags(setting, tmp_path / "found", *more)),
        ("quantize", (*words, *calibration, "--skip-generate", "--save", saved, *sizes)),
        ("evaluate", evaluation(setting, saved, judged, *sizes)),
        processes=processes,
    )
    content = manifest.read(tmp_path / "found" / "search.json")
    assert by_name(content)[trial]["text"] == files.read_json(judged)["text"]
    # The same model: loaded from a checkpoint, not copied.
    assert by_name(content)["fp8+also"]["text"] == by_name(content)["fp8"]["text"]
    assert ("mix" in content["refused"]) == (layout == "PP=2")
    exact = by_name(setting.content)["fp8"]["bytes"]
    assert by_name(content)["fp8"]["bytes"] == pytest.approx(exact, rel=0.001)
    assert by_name(content)["fp8"]["exact"] == (layout == "PP=2")


REFUSED = {
    "no budget": ((), ("the budget (not given)", "--max-size 6GB")),
    "no number": (("--max-size", "small"), ("--max-size small", "not a positive number")),
    "too small": (("--max-size", "500kB"), ("--max-size 500kB", "takes 8")),
    "a format of other GPUs": (
        ("--max-kl", 1, "--search-formats", "mxfp4", "w4a8_fp8_awq", "--gpu", "blackwell"),
        ("--search-formats W4A8_FP8_AWQ_CFG", "INT4_W4A8 on Blackwell"),
    ),
    "a format of another engine": (
        ("--max-kl", 1, "--target", "sglang", "--search-formats", "mxfp4"),
        ("--search-formats MXFP4_DEFAULT_CFG", "SGLang"),
    ),
    "no text": (("--max-kl", 1, "--text", ""), ("--text (not given)", "not calibrated on")),
    "a cache alone": (("--max-kl", 1, "--search-formats", "fp8_kv"), ("--search-kv-caches fp8",)),
    "another folder": (("--max-kl", 1, "--search-dir", "{data}"), ("something else",)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_searched_is_refused_at_once(setting, case, tmp_path):
    more, expected = REFUSED[case]
    more = [str(each).format(data=setting.model / "data") for each in more]
    with pytest.raises(UsageError) as refused:
        make_plan(search.STAGE, [*map(str, flags(setting, tmp_path / "new")), *more])
    for text in expected:
        assert text in f"{refused.value}"


def test_engines_without_mixtures_mix_with_16_bits(setting, tmp_path):
    line = flags(setting, tmp_path / "new", "--max-size", "2.2MB", "--target", "sglang")
    plan = make_plan(search.STAGE, list(map(str, line)))
    names = {each.name for each in plan.space.trials}
    assert {"fp8", "nvfp4", "fp8-or-16-9", "nvfp4-or-16-5"} <= names
    assert not any(name.startswith("mix") for name in names)
