"""distill.py: the loss is the teacher's divergence, the same at every layout and when resumed.

Random models, pruned by prune.py, in float32. Layouts are compared by the logged losses of each
iteration, which hold the gradients of those before.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import tools
import torch

from post_training.checkpoints import torch_dist
from post_training.common import manifest
from post_training.export import readback
from post_training.training import metrics as training_metrics

LENGTH, ITERATIONS = 64, 4
SIZES = {"num_layers": 4, "hidden_size": 96}
TP, PP = ("--tensor-model-parallel-size", 2), ("--pipeline-model-parallel-size", 2)
# Everything that the file can say: two hidden sizes, so that a projection is trained too.
EVERYTHING = """
intermediate_layer_pairs:
  - [decoder.layers.3.input_layernorm, decoder.layers.5.input_layernorm, cosine]
  - [decoder.final_layernorm, decoder.final_layernorm, mse]
skip_lm_loss: false
kd_loss_scale: 2.0
logit_kl_temperature: 1.5
"""
EXPORTS = {"pruned": "pruned_hf", "everything": "distilled_hf", "quantized again": "fp8_hf"}
# Relative difference of losses that were added up in another order; 6e-7 was seen.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distill")
    tools.random_model(folder / "model", "qwen3")
    tools.write_texts(folder / "text.jsonl")
    tools.write_conversations(folder / "chat.jsonl")
    (folder / "everything.yaml").write_text(EVERYTHING)
    (folder / "topk.yaml").write_text("logit_kl_topk: 50")
    return folder


def flags(root, save, *more, student="pruned", data="text.jsonl", iterations=ITERATIONS):
    return (
        *("--load", root / student, "--teacher", root / "model", "--save", root / save, "--fp32"),
        *("--finetune-data-files", root / data, "--seq-length", LENGTH),
        *("--train-iters", iterations, "--micro-batch-size", 1, "--global-batch-size", 4),
        *("--lr", 1e-3, "--log-interval", 1, *more),
    )


@pytest.fixture(scope="module")
def runs(root):
    """One process: prune, quantize, and distill in several ways; export what came out."""
    everything = ("--export-kd-cfg", root / "everything.yaml")
    text = ("--calib-dataset", root / "text.jsonl", "--calib-size", 2)
    text += ("--calib-max-sequence-length", LENGTH)
    once = ("--lr", 1e-9, "--min-lr", 0, "--global-batch-size", 8, "--eval-iters", 0)
    jobs = [
        ("prune", ("--pretrained-model-path", root / "model", "--save", root / "pruned", "--fp32",
                   "--prune-export-config", json.dumps(SIZES), *text)),
        ("quantize", ("--load", root / "pruned", "--save", root / "quantized", "--fp32", *text)),
        ("distill", flags(root, "logits")),
        ("distill", flags(root, "everything", *everything)),
        ("distill", flags(root, "topk", "--export-kd-cfg", root / "topk.yaml", iterations=1)),
        ("distill", flags(root, "resumed", *everything, "--exit-interval", 2)),
        ("distill", flags(root, "resumed", *everything)),
        ("distill", flags(root, "answers", "--answers-only", data="chat.jsonl", iterations=1)),
        ("distill", flags(root, "quantized again", student="quantized", iterations=2)),
        ("distill", flags(root, "once", *once, iterations=1)),
        *(
            ("export", ("--load", root / name, "--export-dir", root / to, "--fp32"))
            for name, to in EXPORTS.items()
        ),
        tools.logits_job(root / "logits of everything", tools.tokens(),
                         "--load", root / "everything", "--fp32"),
    ]  # fmt: skip
    tools.run_stages(*jobs)
    return root


def lines(folder, kind="train"):
    return [each for each in training_metrics.read(folder / "training") if each["kind"] == kind]


def losses(folder, name="loss"):
    return [each[name] for each in lines(folder)]


def transformers_model(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_the_loss_is_the_divergence_from_the_teacher(runs):
    """Mean over the predicting positions of KL(teacher || student), from transformers."""
    import numpy

    (data,) = (runs / "once" / "training" / "data").glob("*/train_ids.npy")
    ids = torch.from_numpy(numpy.load(data)).long()
    with torch.inference_mode():
        teacher, student = (
            transformers_model(runs / name)(ids).logits[:, :-1].log_softmax(-1)
            for name in ("model", "pruned_hf")
        )
    each = (teacher.exp() * (teacher - student)).sum(-1)
    # The run saw 8 of the sequences, each with its own mean: all of them are near.
    (found,) = losses(runs / "once")
    assert each.mean(1).min() < found < each.mean(1).max()
    assert len(ids) >= 8
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(1234))[:8]
    assert found == pytest.approx(each[order].mean().item(), rel=1e-5)


def test_distillation_lowers_the_loss_also_on_held_out_text(runs):
    for name in ("logits", "everything"):
        found = losses(runs / name, "logits")
        assert found[-1] < 0.9 * found[0]
        assert lines(runs / name, "eval")[-1]["logits"] < found[0]


SPLIT = (*TP, "--sequence-parallel")


@pytest.mark.parametrize("sizes", [TP, SPLIT, PP], ids=["TP=2", "TP=2 split", "PP=2"])
def test_two_ranks_have_the_losses_of_one(runs, sizes, tmp_path):
    everything, topk = (
        ("--export-kd-cfg", runs / name, *sizes) for name in ("everything.yaml", "topk.yaml")
    )
    tools.run_stages(
        ("distill", flags(runs, tmp_path / "everything", *everything)),
        ("distill", flags(runs, tmp_path / "topk", *topk, iterations=1)),
        processes=2,
    )
    for name in ("loss", "grad_norm", "logits", "intermediate", "cross_entropy"):
        one, two = losses(runs / "everything", name), losses(tmp_path / "everything", name)
        assert two == pytest.approx(one, rel=TOLERANCE), name
    for name in ("loss", "grad_norm"):
        one, two = losses(runs / "topk", name), losses(tmp_path / "topk", name)
        assert two == pytest.approx(one, rel=TOLERANCE), name


def test_a_resumed_run_has_the_same_losses_to_the_last_bit(runs):
    """The projection between the hidden sizes is restored as well."""
    whole, resumed = (losses(runs / name) for name in ("everything", "resumed"))
    assert resumed == whole
    assert len(whole) == ITERATIONS


def test_answers_only_counts_the_answers(runs):
    (line,) = lines(runs / "answers")
    assert line["loss"] > 0
    (data,) = (runs / "answers" / "training" / "data").glob("*/data.json")
    content = json.loads(data.read_text())
    assert 0 < content["answer_tokens"] < content["tokens"]


def test_the_student_is_saved_alone_and_loads_like_any_checkpoint(runs):
    content = manifest.read(runs / "everything")
    assert content["stage"] == "distill"
    assert content["architecture"]["transformer"]["num_layers"] == 4
    assert content["pruned_from"]["transformer"]["num_layers"] == 6
    assert content["metrics"]["teacher_parameters"] > content["metrics"]["parameters"]
    assert {"model", "teacher", "data"} == {each["role"] for each in content["inputs"]}
    assert not torch_dist.is_quantized(runs / "everything")
    wanted = tools.transformers_logits(transformers_model(runs / "distilled_hf"), tools.tokens())
    found = tools.read_logits(runs / "logits of everything")
    assert (found - wanted).abs().max() < 1e-4
    before = tools.transformers_logits(transformers_model(runs / "pruned_hf"), tools.tokens())
    assert (found - before).abs().mean() > 0.01


def test_a_quantized_student_stays_quantized(runs):
    """Its weights are trained through the rounding; scales and format are as before."""
    before, after = (manifest.read(runs / name) for name in ("quantized", "quantized again"))
    assert after["quantization"] == before["quantization"]
    assert torch_dist.is_quantized(runs / "quantized again")
    folder = readback.Folder(runs / "fp8_hf")
    assert folder.problems() == []
    assert folder.quantization["quant_algo"] == "FP8"
    first, last = losses(runs / "quantized again")
    assert last < first


REFUSED = {
    "no teacher": (("--teacher", ""), "", "--export-kd-teacher-load", "TEACHER_CKPT"),
    "missing teacher": (("--teacher", "/no/such/model"), "", "/no/such/model", "no such folder"),
    "student as teacher": (("--teacher", "STUDENT"), "", "it is the student", "before pruning"),
    "unknown field": ((), "skip_loss: true", "skip_loss", "Did you mean: skip_lm_loss"),
    "no YAML": ((), "a: [", "it is not YAML in line", "field: value"),
    "temperature": ((), "logit_kl_temperature: 0", "logit_kl_temperature 0", "positive"),
    "top-k": ((), "logit_kl_topk: 100000", "logit_kl_topk = 100000", "512 tokens"),
    "unknown loss": ((), "intermediate_layer_pairs: [[a, b, cosin]]", "cosin", "cosine"),
    "layer": (
        (),
        "intermediate_layer_pairs: [[decoder.layers.4, decoder.layers.5]]",
        "decoder.layers.4",
        "the student has 4 layers",
    ),
    "layer of an earlier stage": (
        PP,
        "intermediate_layer_pairs: [[decoder.layers.1, decoder.layers.5]]",
        "decoder.layers.1, PP=2",
        "last pipeline stage",
    ),
    "no pair": ((), "intermediate_layer_pairs: [decoder]", "'decoder'", "it is no student's"),
    "sequence": (("--seq-length", 1000), "", "--seq-length 1000", "256"),
    "rate": (("--lr", -1), "", "--lr -1", "positive"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_mistakes_end_with_exit_code_2_and_one_message(runs, tmp_path, case):
    given, text, what, hint = REFUSED[case]
    given = tuple(runs / "pruned" if word == "STUDENT" else word for word in given)
    if text:
        (tmp_path / "kd.yaml").write_text(text)
        given += ("--export-kd-cfg", tmp_path / "kd.yaml")
    words = flags(runs, tmp_path / "x", *given)
    done = tools.run("distill.py", "--check", *words, code=2)
    assert what in done.stderr
    assert hint in done.stderr
    assert "Traceback" not in done.stderr
    assert "cause:" in done.stderr and "remedy:" in done.stderr


def test_a_refusal_imports_no_torch(runs, tmp_path):
    (tmp_path / "kd.yaml").write_text("skip_loss: true")
    words = flags(runs, tmp_path / "x", "--export-kd-cfg", tmp_path / "kd.yaml")
    command = [sys.executable, "-X", "importtime", tools.ROOT / "distill.py", *map(str, words)]
    done = subprocess.run(command, env=tools.environment(), capture_output=True, text=True)
    assert done.returncode == 2
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "yaml" in imported
    assert not {"torch", "megatron.core", "modelopt"} & imported


def test_another_stage_s_folder_is_not_overwritten(runs):
    done = tools.run("distill.py", "--check", *flags(runs, "quantized"), code=2)
    assert "holds no training run" in done.stderr


def test_distillation_recovers_what_pruning_lost(tiny_model, tmp_path):
    """More than half of it, on the quickstart's trained model, with the README's recipe."""
    data = ("--mmlu-dataset", tiny_model / "data" / "mmlu", "--mmlu-batch-size", 16)
    practice = tmp_path / "practice.jsonl"
    subprocess.run(
        [sys.executable, "-m", "quickstart.practice", "--output", practice],
        cwd=tools.ROOT, check=True,
    )  # fmt: skip
    chat = tiny_model / "data" / "chat.jsonl"
    sizes = {"hidden_size": 96, "ffn_hidden_size": 192, "num_layers": 4}
    tools.run_stages(
        ("prune", ("--pretrained-model-path", tiny_model, "--save", tmp_path / "pruned", *data,
                   "--prune-export-config", json.dumps(sizes), "--calib-dataset", chat,
                   "--calib-size", 32, "--calib-max-sequence-length", 256,
                   "--calib-batch-size", 8)),
        ("distill", ("--load", tmp_path / "pruned", "--save", tmp_path / "distilled",
                     "--teacher", tiny_model, "--finetune-data-files", chat, practice,
                     "--train-iters", 80, "--seq-length", 256, "--micro-batch-size", 8,
                     "--lr", 2e-3, "--min-lr", 1e-4, "--log-interval", 20)),
        ("mmlu", ("--load", tmp_path / "distilled", *data)),
    )  # fmt: skip
    metrics = manifest.read(tmp_path / "pruned")["metrics"]
    before, lost = metrics["before"]["mmlu_accuracy"], metrics["after"]["mmlu_accuracy"]
    report = json.loads((tmp_path / "distilled.mmlu.json").read_text())
    assert before > 0.9
    assert lost < 0.7
    assert report["accuracy"] > lost + (before - lost) / 2
