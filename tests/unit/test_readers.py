"""Property tests: files and flags of any content are read, or refused by a UsageError.

Each property changes a sound file at one to three places, or its text, or its bytes, and reads it
as the stages do before they load anything. No other exception may come out, and no example may take
a second. For a long run, with other examples every time:

    PROPERTY_EXAMPLES=50000 python -m pytest tests/unit/test_readers.py -n 8 --timeout=0 \\
        --hypothesis-profile=hour
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib
import json
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from model_folders import CONFIG, write_checkpoint, write_model
from test_damaged_files import LLAMA, places

from convert import ConvertOptions
from post_training.checkpoints.source import find_source
from post_training.cli.stage import make_plan
from post_training.common import locks, manifest, resumable_jsonl, safetensors_index
from post_training.common.errors import UsageError
from post_training.config import arguments
from post_training.data import document_formats, prompts
from post_training.distillation import options as distillation
from post_training.drafts import features, ground_truth
from post_training.drafts import options as draft_options
from post_training.drafts.eagle3 import draft
from post_training.drafts.eagle3.draft import Draft
from post_training.evaluation import mmlu_data
from post_training.models import tokenizer_files
from post_training.models.families import registry as families
from post_training.pruning import space
from post_training.pruning.score_cache import ScoreCache
from post_training.quantization import recipes

ARCHITECTURE = families.from_huggingface(LLAMA)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=4,
)


@st.composite
def changed(draw: st.DrawFn, content: Any) -> Any:
    """``content`` with one to three values replaced, left out, or exchanged for another of it."""
    content = copy.deepcopy(content)
    if isinstance(content, str):
        return content
    for _ in range(draw(st.integers(1, 3))):
        found = [path for path in places(content) if path] if content else []
        if not found:
            break
        path = draw(st.sampled_from(found))
        inner = content
        for key in path[:-1]:
            inner = inner[key]
        how = draw(st.sampled_from(["replace", "leave out", "exchange"]))
        if how == "leave out":
            del inner[path[-1]]
        elif how == "exchange":
            other: Any = content
            for key in draw(st.sampled_from(found)):
                other = other[key]
            inner[path[-1]] = copy.deepcopy(other)
        else:
            inner[path[-1]] = draw(VALUES)
    return content


def texts(sound: list[Any], write: Callable[[Any], str]) -> st.SearchStrategy[bytes]:
    """The bytes of a file: mostly sound contents that were changed; also what is no such file."""
    contents = st.sampled_from(sound).flatmap(changed).map(write)
    cut = st.builds(
        lambda text, at, more: text[: at % (len(text) + 1)] + more + text[at % (len(text) + 1) :],
        contents,
        st.integers(0, 10_000),
        st.text(max_size=4),
    )
    as_bytes = st.one_of(contents, contents, cut, VALUES.map(write)).map(
        lambda text: text.encode("utf-8", "surrogatepass")
    )
    return st.one_of(as_bytes, as_bytes, as_bytes, st.binary(max_size=64))


def refused_or_read(read: Callable[[], object]) -> None:
    try:
        read()
    except UsageError as error:
        assert error.what and error.cause and error.remedy
    except SystemExit as ended:  # --help
        assert not ended.code


@pytest.fixture(scope="module")
def folder() -> Any:
    with tempfile.TemporaryDirectory() as made:
        yield Path(made)


def write_new(path: Path, content: bytes) -> None:
    """Write a file anew: to overwrite one takes ext4 2 ms, which it spends on flushing."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


@cache
def options(*flags: object) -> ConvertOptions:
    line = [*map(str, flags), "--save", "/x", "--check"]
    return arguments.parse("convert", ConvertOptions, line)


def find(*flags: object) -> None:
    find_source(options(*flags))


def find_model(path: Path) -> None:
    if not (path.parent / "model.safetensors").exists():
        weights = {"model.norm.weight": [64], "model.embed_tokens.weight": [512, 64]}
        content = path.read_bytes()
        write_model(path.parent, None, **weights)
        path.write_bytes(content)
    find("--pretrained-model-path", path.parent)


def find_checkpoint(path: Path) -> None:
    if not (path.parent / "release").exists():
        write_checkpoint(path.parent)
    find("--load", path.parent)


def read_rows(path: Path) -> None:
    document_formats.check(str(path), "--finetune-data-files")


def read_scores(path: Path) -> None:
    ScoreCache(path.parent, {"path": "/model"}, {"layers": 4}, {"samples": 8}).described()


def plan_draft(path: Path) -> None:
    given = options("--eagle-config", path)
    draft_options.plan(given.draft, given, ARCHITECTURE)


def plan_pruning(path: Path) -> None:
    sizes = space.read_sizes(str(path))
    space.check_sizes(sizes, space.PruningSpace.of(ARCHITECTURE, {}).dimensions)


def resume_rows(path: Path) -> None:
    target = path.with_name(path.name.removesuffix(".incomplete.json"))
    write_new(target.with_name(target.name + ".incomplete"), b"x" * 100)
    resumable_jsonl.check(target, {"seed": 1}, overwrite=False)
    resumable_jsonl.Rows(target, {"seed": 1})


def find_features(path: Path) -> None:
    for part in ("train", "eval"):
        (path.parent / part).mkdir(exist_ok=True)
        write_new(path.parent / part / "shard-00000.safetensors", b"x")
    features.find(path.parent, 64).parts()


def read_lock(path: Path) -> None:
    with locks.hold(path.parent / "output", "a command"):
        pass


TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
ROWS = [
    [{"messages": TURNS, "tools": TOOLS}],
    [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}],
    [{"instruction": "a", "input": "b", "output": "c", "history": [["q", "a"]], "system": "s"}],
    [{"text": "a"}, {"text": "b", "question": "q", "answer": "a", "context": "c"}],
]
PROMPTS = [
    [{"question_id": 1, "category": "writing", "turns": ["a", "b"]}],
    [{"prompt": "a"}, {"text": "b"}],
]
QUESTIONS = [
    [{"subject": "art", "question": "q", "choices": ["a", "b"], "answer": 1}],
    [{"subject": "art", "question": "q", "A": "a", "B": "b", "answer": "B"}],
]
DRAFT = Draft("eagle3", draft.configuration(ARCHITECTURE), [0, 1, 2]).to_json()
RECORD = {
    "format": 1,
    "stage": "quantize",
    "command": "quantize.py",
    "architecture": ARCHITECTURE.to_json(),
    "inputs": [{"role": "model", "path": "/x", "manifest_sha256": "0"}],
    "outputs": [{"file": "release/__0_0.distcp", "bytes": 1, "xxh3_128": "0"}],
    "versions": {"torch": "2"},
    "quantization": {"format": "fp8", "exportable": True},
    "draft": DRAFT,
}
FEATURES = {
    **RECORD,
    "stage": "extract_features",
    "features": {
        "sequence_length": 64,
        "shards": [{"file": "train/shard-00000.safetensors", "sequences": 4}],
        "fingerprint": "0",
        "architecture": ARCHITECTURE.to_json(),
        "aux_hidden_state_layer_ids": [0, 1, 2],
    },
    "outputs": [{"file": "train/shard-00000.safetensors", "bytes": 1}],
}
TRUTH = {
    "settings": {"osl": 8, "seed": 1},
    "acceptance": {"acceptance_length": 2.0},
    "answers": [{"id": "0", "prompt": [1, 2], "category": None, "tokens": [3, 4]}],
}
TOKENIZER = {
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []},
    "added_tokens": [{"id": 2, "content": "<s>", "special": True}],
}
SCORES = {
    "format": 1,
    "model": {"path": "/model"},
    "layout": {"layers": 4},
    "calibration": {"sequences": 8, "sequence_length": 64, "source": "x"},
    "search": {"samples": 8},
}
PROGRESS = {"settings": {"seed": 1}, "done": 3, "rows": 3, "bytes": 100, "totals": {"tokens": 4.0}}
RECIPE = {
    "metadata": {"recipe_type": "ptq", "description": "d"},
    "quantize": {"quant_cfg": [{"quantizer_name": "*", "enable": False}], "algorithm": "max"},
}
DISTILLATION = {
    "logit_layers": ["output_layer", "output_layer"],
    "intermediate_layer_pairs": [["decoder.layers.1", "decoder.layers.1", "cosine"]],
    "skip_lm_loss": True,
    "kd_loss_scale": 1.0,
    "logit_kl_temperature": 2.0,
    "logit_kl_topk": 10,
}
INDEX = {"metadata": {"total_size": 1}, "weight_map": {"model.norm.weight": "model.safetensors"}}
HEADER = {"model.norm.weight": {"dtype": "BF16", "shape": [64], "data_offsets": [0, 128]}}


def lines(rows: Any) -> str:
    return "\n".join(json.dumps(each) for each in rows) if isinstance(rows, list) else str(rows)


def header(content: Any) -> str:
    """A safetensors file whose data are zeros, as text of one byte a character."""
    text = json.dumps(content)
    return (len(text).to_bytes(8, "little") + text.encode() + bytes(128)).decode("latin-1")


Reader = Callable[[Path], object]
FILES: dict[str, tuple[str, list[Any], Callable[[Any], str], Reader]] = {
    "config": ("config.json", [CONFIG, LLAMA], json.dumps, find_model),
    "index": ("model.safetensors.index.json", [INDEX], json.dumps, find_model),
    "manifest": (manifest.FILE, [RECORD], json.dumps, find_checkpoint),
    "tracker": ("latest_checkpointed_iteration.txt", ["release", "3"], str, find_checkpoint),
    "header": ("model.safetensors", [HEADER], header, safetensors_index.read_file),
    "tokenizer": (
        "tokenizer.json", [TOKENIZER], json.dumps, lambda p: tokenizer_files.vocabulary(p.parent)
    ),
    "quantized": (
        "hf_quant_config.json",
        [{"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}],
        json.dumps,
        find_model,
    ),
    "generation": (
        "generation_config.json", [{"eos_token_id": 1}, {"eos_token_id": [1, 2]}], json.dumps,
        find_model,
    ),
    "prompts": ("rows.jsonl", [*ROWS, *PROMPTS], lines, lambda p: prompts.load(str(p), "-p")),
    "rows": ("rows.jsonl", ROWS, lines, read_rows),
    "table": ("rows.csv", ["question,answer\na,b\n\"a\nb\",c\n"], str, read_rows),
    "text": ("rows.txt", ["Once upon a time"], str, read_rows),
    "questions": ("test.jsonl", QUESTIONS, lines, lambda p: mmlu_data.load(str(p))),
    "recipe": ("recipe.yaml", [RECIPE], yaml.safe_dump, lambda p: recipes.find(str(p))),
    "distillation": (
        "kd.yaml", [DISTILLATION], yaml.safe_dump, lambda p: distillation.read(str(p))
    ),
    "draft": (
        "eagle.json",
        [{"num_hidden_layers": 1, "eagle_aux_hidden_state_layer_ids": [0, 2, 4]}],
        json.dumps,
        plan_draft,
    ),
    "pruning": (
        "sizes.json", [{"hidden_size": 32, "num_layers": 4, "ffn_hidden_size": 64}], json.dumps,
        plan_pruning,
    ),
    "scores": ("scores.json", [SCORES], json.dumps, read_scores),
    "progress": ("rows.jsonl.incomplete.json", [PROGRESS], json.dumps, resume_rows),
    "features": (manifest.FILE, [FEATURES], json.dumps, find_features),
    "ground truth": ("truth.json", [TRUTH], json.dumps, ground_truth.read),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_files_of_any_content(kind, folder):
    name, sound, write, read = FILES[kind]
    path = folder / kind / name
    path.parent.mkdir()

    @given(texts(sound, write))
    def any_content(content: bytes) -> None:
        if kind == "header":
            content = content.decode("utf-8", "replace").encode("latin-1", "replace")
        write_new(path, content)
        refused_or_read(lambda: read(path))

    any_content()


# A sound command of each stage, without the model; {} is the folder of the inputs.
STAGES = {
    "convert": "--pretrained-model-path {}/model --save {}/new",
    "distill": "--load {}/checkpoint --export-kd-teacher-load {}/model --save {}/new "
    "--finetune-data-files {}/rows.jsonl",
    "eagle3": "--load {}/drafted --save {}/new --finetune-data-files {}/rows.jsonl",
    "evaluate": "--load {}/checkpoint --reference {}/model --text {}/rows.jsonl "
    "--mmlu-dataset {}/test.jsonl --evaluate-output {}/new.json",
    "export": "--load {}/checkpoint --export-dir {}/new",
    "extract_features": "--load {}/drafted --output-dir {}/new --finetune-data-files {}/rows.jsonl",
    "finetune": "--load {}/checkpoint --save {}/new --finetune-data-files {}/rows.jsonl",
    "generate": "--load {}/checkpoint --prompts-path {}/rows.jsonl --output {}/new.jsonl",
    "mmlu": "--load {}/checkpoint --mmlu-dataset {}/test.jsonl --mmlu-output {}/new.json",
    "prune": "--load {}/checkpoint --prune-target-params 0.5 --save {}/new",
    "quantize": "--load {}/checkpoint --save {}/new",
    "validate": "--load {}/drafted --prompts-path {}/rows.jsonl --validate-output {}/new.json",
}
NUMBERS = {int: st.integers(-2, 9) | st.integers(), float: st.floats(-2, 2) | st.floats()}
TEXTS = st.one_of(
    st.sampled_from("nan -inf 1e400 auto [0]*3+[1]*5 1,2 {} -1 / . 0 8 org/name [[[".split()),
    st.just("[" * 9999),
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8),
)


@cache  # a strategy is checked and prepared when it is first drawn from
def given_flag(action: argparse.Action) -> st.SearchStrategy[list[str]]:
    """A flag with values that it may have, or text instead."""
    name = st.sampled_from(sorted(action.option_strings))
    if action.nargs == 0:
        return name.map(lambda flag: [flag])
    fitting = NUMBERS.get(action.type, TEXTS).map(str)  # type: ignore[arg-type]
    if action.choices:
        fitting = st.sampled_from(sorted(map(str, action.choices)))
    values = st.one_of(fitting, fitting, fitting, TEXTS)
    if action.nargs in ("+", "*"):
        return st.builds(lambda flag, each: [flag, *each], name, st.lists(values, max_size=3))
    return st.builds(lambda flag, value: [f"{flag}={value}"], name, values)


@pytest.fixture(scope="module")
def inputs(folder: Path) -> Path:
    """The inputs of :data:`STAGES`: enough for what is checked before the work."""
    write_model(folder / "model", LLAMA)
    described = {"stage": "convert", "architecture": ARCHITECTURE.to_json()}
    write_checkpoint(folder / "checkpoint", **described)
    write_checkpoint(folder / "drafted", **described, draft=DRAFT)
    (folder / "rows.jsonl").write_text(lines(ROWS[0]))
    (folder / "test.jsonl").write_text(lines(QUESTIONS[0]))
    return folder


def names_of(options: type) -> Iterator[str]:
    for field in dataclasses.fields(options):
        held = field.metadata.get("group")
        yield from names_of(held) if held else [field.name]


@pytest.mark.parametrize("stage", STAGES)
def test_flags_of_any_value(stage, inputs, monkeypatch):
    make_parser = cache(arguments.make_parser)
    monkeypatch.setattr(arguments, "make_parser", make_parser)
    found = importlib.import_module(stage).STAGE
    words = STAGES[stage].replace("{}", str(inputs)).split()
    make_plan(found, [*words, "--check"])
    parser = make_parser(stage, found.options, show_all=False)
    every = [each for each in parser._actions if each.option_strings and each.dest != "help"]
    own = [each for each in every if each.dest in set(names_of(found.options))]
    flags = st.one_of(st.sampled_from(own), st.sampled_from(every)).flatmap(given_flag)

    @given(st.lists(flags, min_size=1, max_size=3))
    def any_value(flags: list[list[str]]) -> None:
        line = [word for flag in flags for word in flag]
        refused_or_read(lambda: make_plan(found, [*words, *line, "--check"]))

    any_value()
