"""NaN and infinite values end a stage, named, instead of looking like a result."""

from __future__ import annotations

import io
import pickle
import shutil

import pytest
import tools
import torch
from questions import write_questions
from safetensors.torch import load_file, save_file

from post_training.checkpoints import torch_dist

WEIGHT = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A sound model and its checkpoint, questions and prompts."""
    folder = tmp_path_factory.mktemp("finite")
    changes = {"num_hidden_layers": 2, "tie_word_embeddings": False}
    tools.random_model(folder / "model", "llama3", torch.bfloat16, **changes)
    tools.run("convert.py", "--pretrained-model-path", folder / "model", "--save", folder / "mlm")
    (folder / "questions").mkdir()
    write_questions(folder / "questions")
    tools.write_conversations(folder / "chat.jsonl", 8)
    tools.write_texts(folder / "text.jsonl")
    return folder


def damaged(work, target, name, change):
    """A copy of the model with one tensor changed in place."""
    shutil.copytree(work / "model", target)
    tensors = load_file(target / "model.safetensors")
    change(tensors[name])
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def put(value, row=3, column=5):
    def change(tensor):
        tensor[row, column] = value

    return change


def arguments(work, stage, output):
    return {
        "convert": ("--save", output),
        "mmlu": ("--mmlu-dataset", work / "questions", "--mmlu-output", output),
        "generate": ("--prompts-path", work / "chat.jsonl", "--output", output),
    }[stage]


@pytest.mark.parametrize("stage", ["convert", "mmlu", "generate"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(work, tmp_path, stage, value):
    model = damaged(work, tmp_path / "m", WEIGHT, put(value))
    more = arguments(work, stage, tmp_path / "out")
    done = tools.run(f"{stage}.py", "--pretrained-model-path", model, *more, code=2)
    assert f"{WEIGHT} has 1 values that are not finite, the first at [3, 5]" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_value_that_fp16_cannot_hold_is_said_to_be_the_precisions(work, tmp_path):
    model = damaged(work, tmp_path / "m", WEIGHT, put(1e6))
    flags = ("--pretrained-model-path", model, "--save", tmp_path / "out")
    done = tools.run("convert.py", *flags, "--fp16", code=2)
    assert "in this precision" in done.stderr and "--bf16" in done.stderr
    tools.run("convert.py", *flags)


def test_a_checkpoint_with_nan_is_refused_by_every_rank(work, tmp_path):
    folder = tmp_path / "mlm"
    shutil.copytree(work / "mlm", folder)
    weights = torch_dist.iteration_folder(folder)
    metadata = pickle.loads((weights / ".metadata").read_bytes())
    entry = next(i for i in metadata.storage_data if "linear_fc2.weight" in i.fqn)
    place = metadata.storage_data[entry]
    path = weights / place.relative_path
    data = path.read_bytes()
    tensor = torch.load(io.BytesIO(data[place.offset : place.offset + place.length]))
    tensor.view(-1)[7] = float("nan")
    stream = io.BytesIO()
    torch.save(tensor, stream)
    assert stream.tell() == place.length
    end = place.offset + place.length
    path.write_bytes(data[: place.offset] + stream.getvalue() + data[end:])
    tools.describe_again(folder)
    flags = ("--load", folder, "--tensor-model-parallel-size", 2)
    more = arguments(work, "mmlu", tmp_path / "out.json")
    done = tools.run("mmlu.py", *flags, *more, processes=2, code=1)
    assert "linear_fc2.weight has 1 values that are not finite" in done.stderr


@pytest.mark.parametrize("layout", ["TP=1", "PP=2"])
def test_logits_that_overflow_end_all_ranks(work, tmp_path, layout):
    model = damaged(work, tmp_path / "m", "lm_head.weight", lambda head: head.mul_(1e38))
    processes, flags = tools.LAYOUTS[layout]
    more = arguments(work, "mmlu", tmp_path / "out.json")
    done = tools.run(
        "mmlu.py", "--pretrained-model-path", model, *flags, *more,
        processes=processes, code=2 if processes == 1 else 1,
    )  # fmt: skip
    assert "error: the model's logits" in done.stderr
    assert not (tmp_path / "out.json").exists()


def test_a_training_run_whose_weights_are_spoilt_saves_nothing(work, tmp_path):
    flags = (
        *("--load", work / "mlm", "--teacher", work / "model"),
        *("--finetune-data-files", work / "text.jsonl", "--seq-length", 64, "--eval-iters", 0),
        *("--train-iters", 50, "--save-interval", 1, "--log-interval", 50, "--lr", 1e37),
        *("--clip-grad", 0),
    )
    done = tools.run("distill.py", *flags, "--save", tmp_path / "run", code=2)
    assert "no longer finite" in done.stderr
    if (tmp_path / "run" / torch_dist.TRACKER).exists():
        tools.run("convert.py", "--load", tmp_path / "run", "--save", tmp_path / "again")
