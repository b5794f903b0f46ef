"""generate.sh, validate.sh and export.sh of a draft: what their variables become."""

from __future__ import annotations

import pytest
from confs import ROOT
from launchers import bash, option, planned, started
from model_folders import write_checkpoint

CONF = "Qwen/Qwen3-0.6B"


@pytest.fixture
def drafted_folder(tmp_path):
    """What looks like a checkpoint of Megatron-LM with a draft: its list of tensors names one."""
    folder = write_checkpoint(tmp_path / "drafted")
    (folder / "release" / ".metadata").write_bytes(b"\x80\x04 eagle_module.fc.weight")
    return folder


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"prompt": "What?"}\n')
    return path


def test_generate_takes_prompts_and_output(environment, questions):
    environment |= {"PROMPTS_PATH": str(questions), "MLM_EXTRA_ARGS": "--max-new-tokens 7"}
    words = started("generate.sh", CONF, "--temperature", "0.5", **environment)
    assert words[0] == str(ROOT / "generate.py")
    assert option(words, "--pretrained-model-path") == CONF
    assert option(words, "--prompts-path") == str(questions)
    assert option(words, "--output") == f"{environment['MLM_WORK_DIR']}/{CONF}_generated.jsonl"
    assert option(words, "--max-new-tokens") == "7"
    assert option(words, "--temperature") == "0.5"
    words = started("generate.sh", CONF, **environment, OUTPUT_PATH="/tmp/x.jsonl")
    assert option(words, "--output") == "/tmp/x.jsonl"
    del environment["PROMPTS_PATH"]
    plan = planned("generate.sh", CONF, **environment)
    assert plan.options.prompts.sources == ("HuggingFaceH4/mt_bench_prompts",)


def test_a_server_has_the_model_whatever_the_layout(environment, questions):
    """The conf's and the user's parallel sizes are of a model that is loaded."""
    environment |= {"PROMPTS_PATH": str(questions), "TP": "2", "DP": "4"}
    named = {"SERVER": "http://me:secret@gpu7:8000", "SERVER_MODEL": "tiny"}
    words = started("generate.sh", CONF, **environment, **named)
    assert option(words, "--server") == named["SERVER"]
    assert option(words, "--server-model") == "tiny"
    assert option(words, "--tensor-model-parallel-size") == "1"
    assert "--pretrained-model-path" not in words
    given = ("--server=http://gpu7:8000/v1", "--dry-run")
    done = bash(ROOT / "generate.sh", "auto", *given, **environment)
    assert "server        http://gpu7:8000/v1\nprocesses     1" in done.stdout
    failed = bash(ROOT / "generate.sh", CONF, **environment, **named, MLM_MODEL_CKPT="/x", code=2)
    assert "--load /x with --server" in failed.stderr
    assert "secret" not in failed.stderr


def test_validate_has_the_originals_variables_and_defaults(
    environment, drafted_folder, questions, tmp_path
):
    environment["MLM_MODEL_CKPT"] = str(drafted_folder)
    words = started("validate.sh", CONF, **environment)
    assert option(words, "--load") == str(drafted_folder)
    assert option(words, "--osl") == "64"
    assert option(words, "--steps") == "1"
    assert "--prompts-path" not in words
    assert "--ground-truth-path" not in words
    words = started(
        "validate.sh",
        CONF,
        **environment,
        STEPS="3",
        PROMPTS_PATH=str(questions),
        SAVE_GT_PATH=str(tmp_path / "truth.json"),
        MLM_EXTRA_ARGS="--seed 7",
    )
    # An unset OSL leaves STEPS alone, and the user's own flags stay.
    assert option(words, "--osl") == "64"
    assert option(words, "--steps") == "3"
    assert option(words, "--prompts-path") == str(questions)
    assert option(words, "--save-ground-truth-path") == str(tmp_path / "truth.json")
    assert option(words, "--seed") == "7"


def test_validate_looks_where_eagle3_saves(environment):
    done = bash("validate.sh", CONF, **environment, code=2)
    assert f"{environment['MLM_WORK_DIR']}/{CONF}-Eagle3" in done.stderr


@pytest.mark.parametrize("extra", ["variable", "flag"])
def test_a_draft_is_not_exported_over_the_base(environment, drafted_folder, extra):
    environment["MLM_MODEL_CKPT"] = str(drafted_folder)
    work = environment["MLM_WORK_DIR"]
    assert option(started("export.sh", CONF, **environment), "--export-dir") == (
        f"{work}/{CONF}_export"
    )
    flags = []
    if extra == "variable":
        environment["MLM_EXTRA_ARGS"] = "--export-extra-modules"
    else:
        flags = ["--export-extra-modules"]
    words = started("export.sh", CONF, *flags, **environment)
    assert option(words, "--export-dir") == f"{work}/{CONF}_draft"
