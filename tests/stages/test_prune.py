"""prune.py: what it cuts, that what is left is exact, and that later stages need no flag by hand.

The exported weights are compared with slices of the original's. Which channels are kept is found
from the weights themselves: every value of the random model is different, so a pruned channel can
be recognised. Which should be kept is computed from transformers' activations.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
import speed
import tools
import torch

from post_training.checkpoints import torch_dist
from post_training.common import manifest
from post_training.data import calibration_data
from post_training.export import readback
from post_training.models.families.base import TINY_SIZES

HEADS, GROUPS, HEAD_SIZE = 4, 2, 64
SIZES = {"num_layers": 5, "hidden_size": 96, "ffn_hidden_size": 192, "num_attention_heads": 2}
# As a conf of the unpruned model states it.
CONF = (
    *("--num-layers", 6, "--hidden-size", 128, "--ffn-hidden-size", 256),
    *("--num-attention-heads", HEADS, "--group-query-attention", "--num-query-groups", GROUPS),
    *("--kv-channels", HEAD_SIZE, "--padded-vocab-size", TINY_SIZES["vocab_size"]),
)
CALIBRATION = ("--calib-size", 4, "--calib-max-sequence-length", 64, "--calib-batch-size", 2)
TP, PP = ("--tensor-model-parallel-size", 2), ("--pipeline-model-parallel-size", 2)
FAMILIES = {
    "llama3": {"num_layers": 4, "hidden_size": 64},
    "qwen2.5": {"hidden_size": 96},
    "granite": {"hidden_size": 96},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("prune")


@pytest.fixture(scope="module")
def source(root):
    """A random model with text and multiple-choice questions."""
    tools.random_model(root / "model", "qwen3")
    lines = [json.dumps({"text": f"Fact {i}: {i} plus {i} is {2 * i}."}) for i in range(60)]
    (root / "text.jsonl").write_text("\n".join(lines))
    questions = [
        {"question": f"{i} + 1?", "subject": "sums", "choices": list("1234"), "answer": i % 4}
        for i in range(12)
    ]
    (root / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    return root


def prune_flags(source, save, *more, model="model"):
    return (
        *("--pretrained-model-path", source / model, "--save", save, "--fp32", "--skip-generate"),
        *("--calib-dataset", source / "text.jsonl", *CALIBRATION, *more),
    )


def named(sizes):
    return ("--prune-export-config", json.dumps(sizes), "--prune-num-layers-divisor", 1)


@pytest.fixture(scope="module")
def pruned(source):
    """One process: prune by sizes, search with the kept scores, score, quantize, export."""
    questions = ("--mmlu-dataset", source / "questions.jsonl")
    kept = ("--prune-intermediate-ckpt", source / "scores")
    target = ("--prune-target-params", "900K", "--prune-max-depth-pruning", 0.5)
    memory = ("--prune-target-memory", "2.8MB", "--prune-memory-sequence-length", 256)
    ids = tools.tokens()

    def export(name):
        words = ("--load", source / name, "--export-dir", source / f"{name}_hf", "--fp32")
        return ("export", (*words, *(() if name in FAMILIES else CONF)))

    def logits(name):
        load = ("--load", source / name, "--fp32", *(() if name in FAMILIES else CONF))
        return tools.logits_job(source / f"{name} logits", ids, *load)

    save = ("--save", source / "q", "--calib-dataset", source / "text.jsonl", *CALIBRATION)
    save += ("--skip-generate",)
    jobs = [
        ("prune", prune_flags(source, source / "p", *named(SIZES), *kept, *questions)),
        ("prune", prune_flags(source, source / "searched", *target, *kept, *questions)),
        ("prune", prune_flags(source, source / "small", *memory, *kept)),
        ("mmlu", ("--load", source / "p", *questions, "--fp32", *CONF)),
        export("p"),
        logits("p"),
        export("searched"),
        ("quantize", ("--load", source / "p", "--fp32", *save, *CONF)),
        export("q"),
    ]
    for family, sizes in FAMILIES.items():
        tools.random_model(source / f"{family} model", family)
        flags = prune_flags(source, source / family, *named(sizes), model=f"{family} model")
        jobs += [("prune", flags), export(family), logits(family)]
    return source, tools.run_stages(*jobs).stderr


def recognised(pruned_rows, rows):
    """Index of each row of ``pruned_rows`` among ``rows``: the one equal to it in every value."""
    same = (pruned_rows[:, None, :] == rows[None, :, :]).all(dim=2)
    assert (same.sum(dim=1) == 1).all(), "a row is none of the original's, or two"
    return same.long().argmax(dim=1)


def kept_parts(original, exported, layers):
    """Hidden channels, and of each kept layer heads and FFN channels, found from the weights."""
    name = "model.embed_tokens.weight"
    hidden = recognised(exported[name].T, original[name].T)
    heads, channels = [], []
    for new, old in enumerate(layers):
        mine, theirs = f"model.layers.{new}.", f"model.layers.{old - 1}."

        def rows(name, columns, mine=mine, theirs=theirs):
            rest = original[theirs + name][:, hidden].reshape(-1, columns * len(hidden))
            return recognised(exported[mine + name].reshape(-1, columns * len(hidden)), rest)

        heads.append(rows("self_attn.q_proj.weight", HEAD_SIZE))
        channels.append(rows("mlp.up_proj.weight", 1))
    return hidden, heads, channels


def sliced(original, layers, hidden, heads, channels):
    """Every tensor of the pruned model, cut from the original's."""
    expected = {}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in original:
            expected[name] = original[name][:, hidden]
    expected["model.norm.weight"] = original["model.norm.weight"][hidden]
    for new, old in enumerate(layers):
        dims = (heads[new][:, None] * HEAD_SIZE + torch.arange(HEAD_SIZE)).flatten()
        for name, tensor in original.items():
            prefix = f"model.layers.{old - 1}."
            if not name.startswith(prefix):
                continue
            part = name.removeprefix(prefix)
            if "q_proj" in part:
                tensor = tensor[dims]
            if "gate_proj" in part or "up_proj" in part:
                tensor = tensor[channels[new]]
            if part.endswith("_proj.weight") and "o_proj" not in part and "down" not in part:
                tensor = tensor[:, hidden]
            if "o_proj" in part:
                tensor = tensor[hidden][:, dims]
            if "down_proj" in part:
                tensor = tensor[hidden][:, channels[new]]
            if part.endswith("layernorm.weight"):
                tensor = tensor[hidden]
            expected[f"model.layers.{new}.{part}"] = tensor
    return expected


def compare_with_slices(source, model, exported):
    """Require that the export consists of slices of the model. Returns what was kept."""
    original, found = dict(tools.tensors(model)), dict(tools.tensors(exported))
    layers = manifest.read(exported.with_name(exported.name.removesuffix("_hf")))["metrics"]
    layers = layers["kept_layers"]
    parts = kept_parts(original, found, layers)
    expected = sliced(original, layers, *parts)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    return layers, *parts


def test_the_pruned_model_is_cut_from_the_original_bit_for_bit(pruned):
    source, _ = pruned
    layers, hidden, heads, channels = compare_with_slices(source, source / "model", source / "p_hf")
    assert len(layers) == SIZES["num_layers"]
    assert len(hidden) == SIZES["hidden_size"]
    assert {len(each) for each in channels} == {SIZES["ffn_hidden_size"]}
    for each in heads:
        # One head of each query group.
        assert [int(head) // (HEADS // GROUPS) for head in each] == [0, 1]


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_too(pruned, family):
    """Untied embeddings; biases; a config.json that has to say the size of a head from now on."""
    source, _ = pruned
    compare_with_slices(source, source / f"{family} model", source / f"{family}_hf")
    config = json.loads((source / f"{family}_hf" / "config.json").read_text())
    before = json.loads((source / f"{family} model" / "config.json").read_text())
    head_size = before.get("head_dim") or before["hidden_size"] // HEADS
    assert config["head_dim"] == head_size
    assert config["hidden_size"] == FAMILIES[family]["hidden_size"]


@pytest.mark.parametrize("name", ["p", *FAMILIES])
def test_the_export_gives_transformers_the_same_logits(pruned, name):
    from transformers import AutoModelForCausalLM

    source, _ = pruned
    model = AutoModelForCausalLM.from_pretrained(source / f"{name}_hf", dtype=torch.float32)
    wanted = tools.transformers_logits(model.eval(), tools.tokens())
    found = tools.read_logits(source / f"{name} logits")
    assert wanted.std() > 0.3
    assert torch.equal(found, wanted)


def test_what_is_kept_is_what_the_activations_say(pruned):
    """Importance by the paper's measure, from transformers' activations on the same text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, _ = pruned
    tokenizer = AutoTokenizer.from_pretrained(source / "model")
    text = calibration_data.load_calibration_data(str(source / "text.jsonl"), tokenizer, 4, 64)
    model = AutoModelForCausalLM.from_pretrained(source / "model", dtype=torch.float32).eval()
    layers = model.model.layers
    hidden, channels, angles = torch.zeros(128), [torch.zeros(256) for _ in layers], []

    def magnitude(x):
        return x.detach().abs().mean(dim=1).pow(2).sum(dim=0)

    def add_hidden(_module, _inputs, output):
        hidden.add_(magnitude(output).sqrt())

    def add_channels(number):
        def add(_module, inputs):
            channels[number].add_(magnitude(inputs[0]))

        return add

    def add_angle(_module, inputs, output):
        angles.append(1 - torch.cosine_similarity(inputs[0], output, dim=2).mean().item())

    for number, layer in enumerate(layers):
        layer.input_layernorm.register_forward_hook(add_hidden)
        layer.post_attention_layernorm.register_forward_hook(add_hidden)
        layer.mlp.down_proj.register_forward_pre_hook(add_channels(number))
        layer.register_forward_hook(add_angle)
    with torch.inference_mode():
        model(text.input_ids)
    best = sorted(range(6), key=lambda i: angles[i], reverse=True)[: SIZES["num_layers"]]
    kept, kept_hidden, _, kept_channels = compare_with_slices(
        source, source / "model", source / "p_hf"
    )
    assert kept == sorted(number + 1 for number in best)
    assert set(kept_hidden.tolist()) == set(hidden.topk(96).indices.tolist())
    for new, old in enumerate(kept):
        wanted = channels[old - 1].topk(192).indices
        assert set(kept_channels[new].tolist()) == set(wanted.tolist())


def test_the_checkpoint_says_what_it_is(pruned):
    source, printed = pruned
    content = manifest.read(source / "p")
    transformer = content["architecture"]["transformer"]
    assert {name: transformer[name] for name in SIZES} == SIZES
    assert transformer["kv_channels"] == HEAD_SIZE
    assert content["pruned_from"]["transformer"]["hidden_size"] == 128
    assert manifest.damaged_outputs(source / "p", content) == []
    # No state of ModelOpt's that later stages would have to restore.
    assert not torch_dist.is_quantized(source / "p")
    config = json.loads((source / "p" / "huggingface" / "config.json").read_text())
    exported = json.loads((source / "p_hf" / "config.json").read_text())
    for found in (config, exported):
        assert found["num_hidden_layers"] == 5
        assert len(found["layer_types"]) == 5
        assert (found["hidden_size"], found["head_dim"]) == (96, HEAD_SIZE)
    metrics = content["metrics"]
    parameters = sum(tensor.numel() for _, tensor in tools.tensors(source / "p_hf"))
    assert metrics["after"]["parameters"] == parameters
    assert metrics["after"]["loss"] != metrics["before"]["loss"]
    assert metrics["calibration"]["tokens"] == metrics["calibration"]["tokens_computed"] == 256
    assert "a pruned model needs" in printed and "distillation" in printed


def test_scores_before_and_after_are_those_of_the_mmlu_stage(pruned):
    source, _ = pruned
    metrics = manifest.read(source / "p")["metrics"]
    report = json.loads((source / "p.mmlu.json").read_text())
    assert report["total"] == 12
    assert metrics["after"]["mmlu_accuracy"] == report["accuracy"]
    assert metrics["before"]["mmlu_accuracy"] is not None


def test_a_search_meets_its_target_and_shows_its_candidates(pruned):
    source, printed = pruned
    metrics = manifest.read(source / "searched")["metrics"]
    parameters = sum(tensor.numel() for _, tensor in tools.tensors(source / "searched_hf"))
    assert parameters == metrics["after"]["parameters"] <= 900_000
    candidates = metrics["candidates"]
    assert 1 < len(candidates) <= metrics["candidates_within_limits"]
    assert all(each["parameters"] <= 900_000 for each in candidates)
    scores = [each["score"] for each in candidates]
    assert scores == sorted(scores, reverse=True)
    assert metrics["pruned"] == candidates[0]["config"]
    # Candidates are scored as the pruned model is: by the questions.
    assert scores[0] == metrics["after"]["mmlu_accuracy"]
    assert f"{len(candidates)} scored of" in printed


def test_a_search_by_memory_scores_by_perplexity(pruned):
    source, _ = pruned
    metrics = manifest.read(source / "small")["metrics"]
    after = metrics["after"]
    assert after["weight_bytes"] + after["cache_bytes"] <= 2.8e6
    assert metrics["candidates"][0]["score"] == pytest.approx(-after["loss"], abs=1e-5)


def test_kept_scores_are_used_again(pruned):
    source, printed = pruned
    assert printed.count("are used again, no calibration") == 2
    first, second = (manifest.read(source / name)["metrics"] for name in ("p", "searched"))
    assert first["calibration"] is not None
    assert second["calibration"] is None
    assert first["layer_scores"] == second["layer_scores"]


def test_scores_of_another_model_or_layout_are_refused(pruned):
    source, _ = pruned
    kept = ("--prune-intermediate-ckpt", source / "scores", *named(SIZES))
    other = prune_flags(source, source / "x", *kept, model="llama3 model")
    done = tools.run("prune.py", "--check", *other, code=2)
    assert "its scores are of the model" in done.stderr
    done = tools.run("prune.py", "--check", *prune_flags(source, source / "x", *kept, *PP), code=2)
    assert "'pipeline': 2" in done.stderr


def test_prune_then_quantize_then_export(pruned):
    """The FP8 export of the pruned model is the pruned model, up to E4M3's rounding."""
    source, _ = pruned
    content = manifest.read(source / "q")
    assert content["pruned_from"]["transformer"]["num_layers"] == 6
    folder = readback.Folder(source / "q_hf")
    assert folder.problems() == []
    assert folder.quantization["quant_algo"] == "FP8"
    compared = 0
    for name, tensor in tools.tensors(source / "p_hf"):
        found = folder.dequantized(name)
        if name.endswith("_proj.weight"):
            # Three bits of mantissa: half a step is 1/16 of a normal value.
            assert ((found - tensor).abs() <= tensor.abs() / 16 + tensor.abs().max() / 448).all()
            assert not torch.equal(found, tensor)
            compared += 1
        else:
            assert torch.equal(found, tensor), name
    assert compared == 7 * SIZES["num_layers"]


def test_two_pipeline_stages_prune_as_one(pruned, tmp_path):
    """Five layers of six: one stage is left with three, the other with two."""
    source, _ = pruned
    save = tmp_path / "p"
    flags = prune_flags(source, save, *named(SIZES), *PP)
    tools.run_stages(("prune", flags), processes=2)
    tools.run_stages(
        ("export", ("--load", save, "--export-dir", tmp_path / "p_hf", "--fp32", *CONF))
    )
    one, two = (dict(tools.tensors(path / "p_hf")) for path in (source, tmp_path))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    output = tmp_path_factory.mktemp("mixture") / "moe.pt"
    tools.run("tests/helpers/pruning_worker.py", output, "--fp32")
    return torch.load(output, weights_only=True)


def test_targets_out_of_reach_are_refused_before_the_weights_are_loaded(mixture):
    assert "the smallest architecture of the search has params" in mixture["too small"]
    assert "--prune-max-width-pruning 0.4" in mixture["too small"]
    assert "the model meets it already" in mixture["too large"]


def test_experts_shared_experts_and_a_list_of_layers_are_pruned(mixture):
    found = mixture
    assert found["experts"] == 4
    assert found["pattern"] == [(0, 1, 1, 1)[number - 1] for number in found["kept_layers"]]
    total, active = found["computed"]
    assert found["counted"] == total > active
    assert found["logits"].isfinite().all() and found["logits"].std() > 0.3
    assert torch.equal(found["loaded"], found["logits"])


REFUSED = {
    "TP=2": ((*named(SIZES), *TP), "TP=2", "PP spreads"),
    "width between steps": (named({"hidden_size": 100}), "hidden_size = 100", "use 96 or 128"),
    "larger width": (named({"ffn_hidden_size": 512}), "ffn_hidden_size = 512", "only removes"),
    "heads across groups": (named({"num_attention_heads": 3}), "= 3", "use 2 or 4"),
    "query groups": (named({"num_query_groups": 1}), "num_query_groups = 1", "keeps all groups"),
    "unknown key": (named({"hiden_size": 96}), "hiden_size", "Did you mean: hidden_size"),
    "no experts": (named({"num_moe_experts": 4}), "num_moe_experts", "has no experts"),
    "no layer": (named({"num_layers": 0}), "num_layers = 0", "use 1 or 2"),
    "text": (named({"num_layers": "4"}), 'num_layers = "4"', "whole number"),
    "nothing": (named({"hidden_size": 128}), "128", "leaves everything as it is"),
    "malformed JSON": (("--prune-export-config", "{'hidden_size': 96}"), "{'hidden", "not JSON"),
    "missing file": (("--prune-export-config", "sizes.json"), "sizes.json", "nor a file"),
    "no target": ((), "what to prune", "--prune-target-params 6e9"),
    "two targets": ((*named(SIZES), "--prune-target-params", "1M"), "--prune-target", "one of"),
    "target": (("--prune-target-params", "6q"), "--prune-target-params 6q", "6e9"),
    "target beyond numbers": (("--prune-target-params", "1e400"), "1e400", "6e9"),
    "share of all": (("--prune-max-width-pruning", "nan"), "--prune-max-width-pruning nan", "0.9"),
    "skip": (
        ("--prune-target-params", "1M", "--prune-hparams-to-skip", "hidden"),
        "--prune-hparams-to-skip hidden",
        "hidden_size",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_mistakes_end_with_exit_code_2_and_one_message(source, tmp_path, case):
    given, what, hint = REFUSED[case]
    done = tools.run("prune.py", "--check", *prune_flags(source, tmp_path / "p", *given), code=2)
    assert what in done.stderr
    assert hint in done.stderr
    assert "Traceback" not in done.stderr
    assert "cause:" in done.stderr and "remedy:" in done.stderr


@pytest.mark.skipif(
    __import__("importlib.util").util.find_spec("mamba_ssm") is not None, reason="Mamba is here"
)
def test_mamba_sizes_are_refused_where_mamba_is_not_installed(source, tmp_path):
    flags = prune_flags(source, tmp_path / "p", *named({"mamba_num_heads": 4}))
    done = tools.run("prune.py", "--check", *flags, code=2)
    assert "mamba_num_heads" in done.stderr and "not installed" in done.stderr


def test_a_refusal_takes_less_than_a_second_and_no_torch(source, tmp_path):
    words = prune_flags(source, tmp_path / "p", *named({"hidden_size": 100}))
    seconds = []
    for _ in range(3):
        started = time.monotonic()
        tools.run("prune.py", *words, code=2)
        seconds.append(time.monotonic() - started)
    assert min(seconds) < speed.scaled(1)
    command = [sys.executable, "-X", "importtime", tools.ROOT / "prune.py", *map(str, words)]
    done = subprocess.run(command, env=tools.environment(), capture_output=True, text=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "argparse" in imported
    assert not {"torch", "megatron.core", "modelopt"} & imported


def test_a_quantized_checkpoint_is_not_pruned(pruned, tmp_path):
    source, _ = pruned
    flags = ("--load", source / "q", "--save", tmp_path / "p", *named({"hidden_size": 64}))
    done = tools.run("prune.py", "--check", *flags, code=2)
    assert "quantized, or has a draft" in done.stderr
