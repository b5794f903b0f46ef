"""``--dry-run``: parameters as in built models, for any layout, without loading or starting it."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys

import pytest
import speed
import tools
import torch
from confs import ROOT, conf_architecture, conf_flags, parse

from post_training.checkpoints import record
from post_training.common import manifest, redaction
from post_training.common.errors import UsageError
from post_training.distributed.parallel import Parallel
from post_training.distributed.session import Session
from post_training.models import parallel_check, parameter_count
from post_training.models.architecture import Architecture

# As the models' publishers count them, without DeepSeek's 58 x 256 router biases (no parameters
# in megatron-core) and its extra layer for predicting further tokens.
PUBLISHED = {
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "Qwen/Qwen3-235B-A22B": 235_093_634_560,
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.1-405B-Instruct": 405_853_388_800,
    "deepseek-ai/DeepSeek-R1": 671_026_419_200 - 58 * 256,
}


@pytest.mark.parametrize("conf", PUBLISHED)
def test_the_total_is_the_published_one(conf):
    assert parameter_count.total(conf_architecture(conf)) == PUBLISHED[conf]


# Real shapes of layers, few of them, at layouts of up to hundreds of ranks.
LAYOUTS = [
    ("Qwen/Qwen3-0.6B", {"num_layers": 4}, {"tensor": 2, "pipeline": 2}),
    ("Qwen/Qwen2.5-0.5B-Instruct", {"num_layers": 3}, {"pipeline": 3}),
    ("meta-llama/Llama-3.1-405B-Instruct", {"num_layers": 2}, {"tensor": 8, "pipeline": 2}),
    (
        "deepseek-ai/DeepSeek-R1",
        {"num_layers": 5, "moe_layer_freq": [0, 0, 0, 1, 1]},
        {"tensor": 4, "pipeline": 3, "expert": 64, "expert_tensor": 1, "last_layers": 1},
    ),
    (
        "Qwen/Qwen3-30B-A3B",
        {"num_layers": 3, "moe_layer_freq": [1, 1, 1]},
        {"tensor": 2, "pipeline": 3, "expert": 8, "expert_tensor": 1},
    ),
    (
        "Qwen/Qwen3-235B-A22B",
        {"num_layers": 2, "moe_layer_freq": [1, 1]},
        {"tensor": 4, "pipeline": 2, "expert": 16, "expert_tensor": 2},
    ),
    (
        "moonshotai/Kimi-K2-Instruct",
        {"num_layers": 2, "moe_layer_freq": [0, 1]},
        {"tensor": 8, "pipeline": 2, "expert": 16, "expert_tensor": 2},
    ),
    (
        "Qwen/Qwen3-0.6B",
        {
            "num_layers": 4,
            "normalization": "LayerNorm",
            "add_bias_linear": True,
            "gated_linear_unit": False,
            "activation_func": "gelu",
            "num_moe_experts": 8,
            "moe_layer_freq": 2,
            "moe_ffn_hidden_size": 256,
        },
        {"tensor": 2, "expert": 4, "expert_tensor": 1, "pipeline": 2},
    ),
]
BUILDER = """
import json, sys
from post_training import portable
portable.install()
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore
from megatron.core import parallel_state
from post_training.models.architecture import Architecture
from post_training.models.builder import BuildOptions, build
import post_training.models.builder as models
models._materialize = lambda model: None  # counted on the meta device: no memory
results = []
for case in json.load(sys.stdin):
    sizes, world = case["sizes"], case["world"]
    counts = []
    for stage in range(sizes.get("pipeline", 1)):
        # One process stands for any rank of many: groups exist, nothing is communicated.
        rank = stage * world // sizes.get("pipeline", 1)
        torch.distributed.init_process_group(
            "fake", store=FakeStore(), rank=rank, world_size=world
        )
        parallel_state.initialize_model_parallel(
            sizes.get("tensor", 1), sizes.get("pipeline", 1),
            expert_model_parallel_size=sizes.get("expert", 1),
            expert_tensor_parallel_size=sizes.get("expert_tensor"),
            create_gloo_process_groups=False,
        )
        options = BuildOptions(
            meta_device=True, overrides={
                "num_layers_in_first_pipeline_stage": sizes.get("first_layers"),
                "num_layers_in_last_pipeline_stage": sizes.get("last_layers"),
            },
        )
        model = build(Architecture.from_json(case["architecture"]), options)
        counts.append(sum(each.numel() for each in model.parameters()))
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
    results.append(counts)
print(json.dumps(results))
"""


def test_every_rank_holds_as_many_parameters_as_megatron_core_allocates():
    cases = []
    expected = []
    for conf, changes, sizes in LAYOUTS:
        content = conf_architecture(conf).to_json()
        content["transformer"] |= changes
        divided = Parallel.of_world(None, **sizes)
        expected.append([count for _, count in parameter_count.per_stage(
            Architecture.from_json(content), divided)])  # fmt: skip
        cases.append({"architecture": content, "sizes": sizes, "world": divided.world})
    done = subprocess.run(
        [sys.executable, "-c", BUILDER],
        input=json.dumps(cases),
        cwd=tools.ROOT,
        env=tools.environment(),
        capture_output=True,
        text=True,
        timeout=speed.scaled(300),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    built = json.loads(done.stdout.splitlines()[-1])
    for case, mine, theirs in zip(LAYOUTS, expected, built, strict=True):
        assert mine == theirs, case


def dry_run(script: str, *words: str, code: int = 0, **variables: str):
    environment = tools.environment(PYTHON=sys.executable, **variables)
    done = subprocess.run(
        ["bash", str(ROOT / script), *words, "--dry-run"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=speed.scaled(60),
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def test_a_large_model_at_many_ranks_is_planned_in_a_second_without_torch():
    sizes = {"PP": "16", "EP": "64", "NNODES": "128"}
    first_and_last = ["--decoder-first-pipeline-num-layers", "3"]
    first_and_last += ["--decoder-last-pipeline-num-layers", "2"]
    shown = dry_run(
        "quantize.sh", "moonshotai/Kimi-K2-Instruct", "NVFP4_DEFAULT_CFG", *first_and_last, **sizes
    ).stdout
    assert "1024: TP=1 PP=16 CP=1 EP=64 ETP=1 DP=64, on 128 nodes with 8 each" in shown
    assert "1,026,408,209,408" in shown
    assert "stages 1 to 14: 4 layers" in shown
    assert "--nproc_per_node=8 --nnodes=128" in shown
    assert "--dry-run" not in shown
    program = "import sys, runpy; sys.argv = sys.argv[1:]\ntry: runpy.run_path(sys.argv[0], "
    program += "run_name='__main__')\nfinally: print('torch' in sys.modules)"
    words = ["quantize.py", *conf_flags("moonshotai/Kimi-K2-Instruct"), "--dry-run", "--save", "x"]
    done = subprocess.run(
        [sys.executable, "-c", program, *words, "--pretrained-model-path", "a/b"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "False"


def test_inputs_may_be_missing_but_nothing_else_may_be_wrong(tmp_path):
    later = {"MLM_MODEL_CKPT": str(tmp_path / "later"), "EXPORT_DIR": str(tmp_path / "out")}
    shown = dry_run("export.sh", "Qwen/Qwen3-8B", PP="2", **later).stdout
    assert "later (not on this machine yet)" in shown
    assert "stage 1: 18 layers" in shown
    wrong = dry_run("export.sh", "Qwen/Qwen3-8B", PP="5", code=2, **later).stderr
    assert "36 layers cannot be spread evenly over 5 pipeline stages" in wrong
    assert not list(tmp_path.iterdir())


def test_the_launch_line_hides_tokens_and_quotes_spaces():
    given = {"MLM_EXTRA_ARGS": '--prompts "a b" --references hf_abcdefghijklmnopqrstuvwxyz'}
    shown = dry_run("quantize.sh", "Qwen/Qwen3-8B", **given).stdout
    assert "--prompts 'a b' --references 'hf_***'" in shown
    assert "abcdefghij" not in shown
    given = {"MLM_EXTRA_ARGS": "--references x-my-secret", "HF_TOKEN": "my-secret"}
    shown = dry_run("quantize.sh", "Qwen/Qwen3-8B", **given).stdout
    assert "--references 'x-***'" in shown and "my-secret" not in shown


def test_the_launch_line_of_a_model_with_experts_can_be_pasted():
    more = "--moe-token-dispatcher-type alltoall --calib-max-sequence-length 64"
    shown = dry_run("quantize.sh", "moonshotai/Kimi-K2-Instruct", MLM_EXTRA_ARGS=more).stdout
    words = shlex.split(shown.split("launch line")[1].splitlines()[0])
    assert words[-4:] == more.split()
    assert words[2 : 2 + len(conf_flags("moonshotai/Kimi-K2-Instruct"))] == conf_flags(
        "moonshotai/Kimi-K2-Instruct"
    )


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["--hf-token", "mine", "--x"], "--hf-token '***' --x"),
        (["--hf-token=mine"], "'--hf-token=***'"),
        (["--api-key", "mine", "--password=mine"], "--api-key '***' '--password=***'"),
        (["--token", "--token", "x"], "--token '***' x"),
        (["--max-new-tokens", "10", "--moe-token-drop-policy", "probs"],
         "--max-new-tokens 10 --moe-token-drop-policy probs"),
        (["--tokenizer-model", "org/name"], "--tokenizer-model org/name"),
        (["--mlflow", "https://me:mine@host/x"], "--mlflow 'https://***@host/x'"),
    ],
)  # fmt: skip
def test_only_secrets_are_hidden(words, shown):
    assert redaction.quoted(words) == shown


def test_a_manifest_holds_no_secret(tmp_path, monkeypatch):
    hub, own = "hf_" + "Secret" * 6, 'a "quoted" secret'
    monkeypatch.setenv("HF_TOKEN", own)
    monkeypatch.setattr(sys, "argv", ["quantize.py", "--references", hub, "--prompts", own])
    content = {"references": hub, "prompts": [own, 3], "seed": 1}
    manifest.Manifest("quantize", {}, configuration=content).write(tmp_path)
    text = (tmp_path / manifest.FILE).read_text()
    assert "Secret" not in text and "secret" not in text
    found = json.loads(text)
    assert found["configuration"] == {"references": "hf_***", "prompts": ["***", 3], "seed": 1}
    assert found["command"] == "quantize.py --references 'hf_***' --prompts '***'"


def test_a_report_holds_no_secret():
    hub = "hf_" + "Secret" * 6
    session = Session("mmlu", Parallel(), torch.device("cpu"), rank=0, world=1)
    content = record.report_of_run(parse("--tokenizer-model", hub), session, [], {})
    assert content["configuration"] == {"tokenizer_model": "hf_***"}


def test_what_cannot_be_counted_is_named():
    content = conf_architecture("Qwen/Qwen3-0.6B").to_json()
    content["transformer"]["mtp_num_layers"] = 1
    with pytest.raises(UsageError, match="mtp_num_layers = 1"):
        parameter_count.total(Architecture.from_json(content))


@pytest.mark.parametrize("stages", [10**10, 10**20])
def test_a_huge_number_of_pipeline_stages_takes_no_memory(stages):
    with pytest.raises(UsageError, match="cannot be spread evenly"):
        parallel_check.layers_per_stage(6, Parallel(pipeline=stages))
