"""Models by hub name: real downloads, from a hub on this machine."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess

import hub
import pytest
import speed
import tools
import torch

from post_training.common import manifest

NAME = "org/tiny"
STATED = "license: apache-2.0\nlanguage:\n- en\n"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "model"
    tools.random_model(folder, "qwen3", torch.bfloat16)
    (folder / "README.md").write_text(f"---\n{STATED}tags: [chat]\n---\n# The best of all models\n")
    return folder


@pytest.mark.parametrize(
    ("file", "change", "cause"),
    [
        ("config.json", {"architectures": ["UnheardOfForCausalLM"]}, "UnheardOfForCausalLM"),
        ("config.json", {"hidden_act": "tanh"}, "hidden_act"),
        ("config.json", {"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ("hf_quant_config.json", {"quantization": {"quant_algo": "FP8"}}, "hf_quant_config.json"),
    ],
)
def test_a_model_is_refused_before_its_weights_are_downloaded(
    source, tmp_path, file, change, cause
):
    folder = shutil.copytree(source, tmp_path / "model")
    path = folder / file
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **change}))
    with hub.serving(folder, NAME) as server:
        done = tools.run(
            *("convert.py", "--pretrained-model-path", NAME, "--save", tmp_path / "out"),
            code=2,
            HF_HOME=str(tmp_path / "cache"),
            **server.environment,
        )
    assert cause in done.stderr
    assert "config.json" in server.sent
    assert not [name for name in server.sent if name.endswith(".safetensors")]


def test_every_machine_downloads_into_its_own_cache(source, tmp_path):
    """Two machines, as two processes that share nothing but the output."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ("--pretrained-model-path", NAME, "--save", tmp_path / "out")
    split = ("--tensor-model-parallel-size", 2)
    with hub.serving(source, NAME) as server:
        machines = [
            subprocess.Popen(
                tools.command("convert.py", *flags, *split),
                env=tools.environment(
                    **server.environment,
                    HF_HOME=str(tmp_path / f"cache{rank}"),
                    RANK=str(rank),
                    WORLD_SIZE="2",
                    LOCAL_RANK="0",
                    MASTER_ADDR="127.0.0.1",
                    MASTER_PORT=str(port),
                ),
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        told = [each.communicate(timeout=speed.scaled(300))[1] for each in machines]
    assert [each.returncode for each in machines] == [0, 0], told
    assert server.sent.count("model.safetensors") == 2
    tools.run("export.py", "--load", tmp_path / "out", "--export-dir", tmp_path / "back")
    back, wanted = dict(tools.tensors(tmp_path / "back")), dict(tools.tensors(source))
    assert back.keys() == wanted.keys()
    assert all(torch.equal(back[name], wanted[name]) for name in wanted)
    # The card says where it comes from, under which license, and nothing that is the original's.
    card = (tmp_path / "back" / "README.md").read_text()
    assert f"base_model: {NAME}\n{STATED}library_name: transformers\n" in card
    assert "best of all" not in card and "chat" not in card
    assert "README.md" in [each["file"] for each in manifest.read(tmp_path / "back")["outputs"]]


@pytest.mark.parametrize(
    ("stage", "flags", "cause"),
    [
        ("quantize.py", ("--export-quant-cfg", "NVFP4_EXPERTS_ONLY_CFG"), "has none"),
        ("prune.py", ("--prune-export-config", '{"num_layers": 40}'), "num_layers"),
        ("convert.py", ("--algorithm", "eagle3", "--draft-vocab-size", 9999), "--draft-vocab-size"),
        ("eagle3.py", ("--draft-vocab-size", 9999, "--finetune-data-files", "text"), "9999"),
        (
            "distill.py",
            ("--teacher", "teacher", "--seq-length", 64, "--finetune-data-files", "text"),
            "vocabulary",
        ),
    ],
)
def test_what_a_stage_refuses_is_refused_before_the_weights_are_downloaded(
    source, tmp_path, stage, flags, cause
):
    """Checks that need the model's sizes, of a model whose sizes are on the hub."""
    tools.write_conversations(tmp_path / "text.jsonl", 4)
    tools.random_model(tmp_path / "teacher", "qwen3", torch.bfloat16, vocab_size=640)
    named = {"text": tmp_path / "text.jsonl", "teacher": tmp_path / "teacher"}
    with hub.serving(source, NAME) as server:
        done = tools.run(
            *(stage, "--pretrained-model-path", NAME, "--save", tmp_path / "out"),
            *(named.get(word, word) for word in flags),
            code=2,
            HF_HOME=str(tmp_path / "cache"),
            **server.environment,
        )
    assert cause in done.stderr, done.stderr
    assert not [name for name in server.sent if name.endswith(".safetensors")]
    assert not (tmp_path / "out").exists()
