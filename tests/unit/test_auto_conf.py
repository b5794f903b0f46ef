"""``auto`` as the conf's name: the architecture comes from config.json or the checkpoint."""

from __future__ import annotations

import pytest
from launchers import bash, option, planned, started
from model_folders import CONFIG, write_checkpoint, write_model

from post_training.common.errors import UsageError
from post_training.models.families import registry as families

# What a stage needs beside the model.
NEEDS = {
    "convert": {},
    "quantize": {},
    "prune": {"MLM_EXTRA_ARGS": "--prune-target-params 100K"},
    "distill": {},
    "finetune": {},
    "generate": {"PROMPTS_PATH": "org/prompts"},
    "eagle3": {"MLM_EXTRA_ARGS": "--seq-length 128"},
    "extract_features": {"MLM_EXTRA_ARGS": "--output-dir features --seq-length 128"},
    "evaluate": {"MLM_EXTRA_ARGS": "--text org/text"},
    "mmlu": {},
    "search": {"MLM_EXTRA_ARGS": "--text org/text --max-kl 1"},
    "validate": {},
    "export": {},
}


@pytest.fixture
def model(tmp_path):
    folder = write_model(tmp_path / "Tiny", {**CONFIG, "max_position_embeddings": 4096})
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.mark.parametrize("name", [family.name for family in families.FAMILIES.values()])
def test_every_family_is_read_from_its_config(name, environment, tmp_path):
    family = next(each for each in families.FAMILIES.values() if each.name == name)
    config = family.tiny_config()
    folder = write_model(tmp_path / "Tiny", config)
    (folder / "tokenizer.json").write_text("{}")
    found = planned("convert.sh", "auto", **environment, HF_MODEL_CKPT=str(folder))
    expected = families.from_huggingface(config)
    assert found.source.described == expected
    content = {"architecture": expected.to_json()}
    checkpoint = write_checkpoint(tmp_path / "Tiny_mlm", **content)
    found = planned("convert.sh", "auto", **environment, MLM_MODEL_CKPT=str(checkpoint))
    assert found.source.described == expected
    assert found.save.name == "Tiny_mlm"


@pytest.mark.parametrize("stage", NEEDS)
def test_every_stage_takes_the_model_of_config_json(stage, model, environment, tmp_path):
    """The Megatron checkpoints are not there yet: an earlier job is going to make them."""
    environment |= {**NEEDS[stage], "HF_MODEL_CKPT": str(model)}
    environment["TEACHER_CKPT"] = str(tmp_path / "teacher_mlm")
    environment["MLM_MODEL_CKPT"] = str(tmp_path / "student_mlm")
    plan = planned(f"{stage}.sh", "auto", **environment)
    assert plan.source.is_checkpoint
    assert plan.source.described.value("num_layers") == CONFIG["num_hidden_layers"]
    assert plan.source.described.huggingface_architecture == "Qwen3ForCausalLM"


def test_outputs_are_named_after_the_model(model, environment):
    work = environment["MLM_WORK_DIR"]
    words = started("quantize.sh", "auto", "fp8", **environment, HF_MODEL_CKPT=str(model))
    assert option(words, "--save") == f"{work}/Tiny_quant"
    assert words[1:3] == ["--tokenizer-model", str(model)]
    words = started("convert.sh", "auto", **environment, HF_MODEL_CKPT="org/Name-1B")
    assert option(words, "--save") == f"{work}/org/Name-1B_mlm"
    given = {"MLM_LAUNCH": "words", "MLM_MODEL_CKPT": "/work/a/Name-1B_mlm/"}
    words = bash("export.sh", "auto", **environment, **given).stdout.split("\0")
    assert option(words, "--export-dir") == f"{work}/Name-1B_export"


def test_a_pipeline_of_jobs_takes_it_too(model, environment):
    environment["HF_MODEL_CKPT"] = str(model)
    (model / "tokenizer.json").write_text("{}")
    shown = bash("slurm/pipeline.sh", "--dry-run", "quantize", "auto", "fp8", **environment).stdout
    work = environment["MLM_WORK_DIR"]
    assert f"--load {work}/Tiny_quant" in shown and f"--export-dir {work}/Tiny_export" in shown
    assert shown.count("num_layers=6") == 4
    line = ("--dry-run", "quantize-export", "auto", "fp8")
    shown = bash("slurm/pipeline.sh", *line, **environment, MLM_MODEL_SAVE="/old").stdout
    assert f"--export-dir {work}/Tiny_export" in shown and "--save" not in shown


def test_without_a_model_auto_is_refused(environment, tmp_path):
    done = bash("convert.sh", "auto", **environment, code=2)
    assert "neither HF_MODEL_CKPT nor MLM_MODEL_CKPT names a model" in done.stderr
    absent = str(tmp_path / "absent")
    with pytest.raises(UsageError, match="on this machine"):
        planned("export.sh", "auto", **environment, MLM_MODEL_CKPT=absent)
    with pytest.raises(UsageError, match="there is no such folder"):
        planned("convert.sh", "auto", **environment, HF_MODEL_CKPT=absent)


def test_a_named_conf_is_compared_with_config_json_value_by_value(model, environment):
    with pytest.raises(UsageError) as error:
        planned("quantize.sh", "Qwen/Qwen3-0.6B", **environment, HF_MODEL_CKPT=str(model))
    for difference in (
        "num_layers is 28 in the conf and 6 in config.json",
        "hidden_size is 1024 in the conf and 64 in config.json",
        "vocab_size is 151936 in the conf and 512 in config.json",
    ):
        assert difference in str(error.value)


def test_a_hub_name_is_read_from_the_cache_where_it_was_downloaded(
    model, environment, tmp_path, monkeypatch
):
    revision = tmp_path / "cache" / "models--org--Name" / "snapshots" / "0123"
    revision.mkdir(parents=True)
    (revision / "config.json").write_text((model / "config.json").read_text())
    (revision.parents[1] / "refs").mkdir()
    (revision.parents[1] / "refs" / "main").write_text("0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    plan = planned("mmlu.sh", "auto", **environment, HF_MODEL_CKPT="org/Name")
    assert plan.source.described.value("hidden_size") == CONFIG["hidden_size"]
