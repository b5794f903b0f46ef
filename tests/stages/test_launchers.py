"""The launchers: confs, variables, the number of processes, and what is started in the end.

``LAUNCH_SCRIPT`` replaces what starts the stage. Here it is ``printf``, which shows the command
line word by word, after the real stage has checked it.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import speed
from confs import ROOT, conf_architecture, conf_flags
from launchers import SHOW, bash, option, started
from model_folders import write_checkpoint, write_model
from released_configs import RELEASED

# A conf of each family; tests/unit/test_arguments.py parses all with every stage.
ONE_OF_EACH = sorted({each["architectures"][0]: conf for conf, each in RELEASED.items()}.values())
SIZES = ("tensor-model", "pipeline-model", "context", "expert-model", "expert-tensor")
needs_quantize = pytest.mark.skipif(
    not (ROOT / "quantize.py").exists(), reason="the stage is not there yet"
)


def write_conf(root: Path, text: str, name: str = "org/model") -> dict[str, str]:
    """A conf folder as SANDBOX_ROOT, with one conf."""
    path = root / "conf" / "model" / f"{name}.sh"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return {"SANDBOX_ROOT": str(root)}


ORIGINAL_CONF = """#!/bin/bash

if [ -z ${HF_MODEL_CKPT} ]; then
    HF_MODEL_CKPT=org/name
    TOKENIZER_MODEL=org/name
else
    TOKENIZER_MODEL=${HF_MODEL_CKPT}
fi

MODEL_ARGS=" \\
    --save-interval 100000 \\
    --micro-batch-size 1 \\
    --bf16 \\
    --num-layers 61 \\
    --moe-layer-freq [0]*3+[1]*58 \\
    --use-mcore-models \\
"
"""


@pytest.mark.parametrize("conf", ONE_OF_EACH)
@pytest.mark.parametrize("stage", ["convert", "quantize", "mmlu", "export"])
def test_every_stage_starts_with_a_conf_of_every_family(stage, conf, environment, tmp_path):
    if stage == "export" or "--num-experts" in conf_flags(conf):
        environment["MLM_MODEL_CKPT"] = str(write_checkpoint(tmp_path / "checkpoint"))
    words = started(f"{stage}.sh", conf, **environment)
    assert words[0] == str(ROOT / f"{stage}.py")
    flags = conf_flags(conf)
    assert words[1 : 1 + len(flags)] == flags


@pytest.mark.parametrize("conf", ONE_OF_EACH)
def test_prune_and_distill_start_with_a_conf_of_every_family(conf, environment, tmp_path):
    target = ("--prune-target-params", "1M")
    environment["MLM_MODEL_CKPT"] = str(write_checkpoint(tmp_path / "student"))
    described = conf_architecture(conf)
    if described.unfusable_norms or described.is_hybrid:
        refused = bash(ROOT / "prune.sh", conf, *target, **environment, code=2).stderr
        assert ("one part each" if described.is_hybrid else "fuse each norm") in refused
    else:
        words = started("prune.sh", conf, *target, **environment)
        assert words[0] == str(ROOT / "prune.py")
        assert option(words, "--save") == f"{environment['MLM_WORK_DIR']}/{conf}_pruned"
        assert tuple(words[-2:]) == target
    environment["TEACHER_CKPT"] = str(write_checkpoint(tmp_path / "teacher"))
    words = started("distill.sh", conf, **environment, MLM_TRAIN_ARGS="--train-iters 7")
    assert words[0] == str(ROOT / "distill.py")
    assert option(words, "--save") == f"{environment['MLM_WORK_DIR']}/{conf}_distilled"
    assert option(words, "--export-kd-teacher-load") == environment["TEACHER_CKPT"]
    assert option(words, "--train-iters") == "7"


def test_prune_takes_one_copy_of_the_model(environment):
    target = ("--prune-target-params", "1M")
    done = bash(ROOT / "prune.sh", "Qwen/Qwen3-0.6B", *target, **environment, DP="2", code=2)
    assert "DP=2" in done.stderr and "DP=1" in done.stderr


@pytest.mark.parametrize("stage", ["convert", "quantize", "mmlu"])
def test_a_family_that_cannot_be_converted_yet_is_refused_before_any_download(stage, environment):
    environment["MLM_EXTRA_ARGS"] = "--is-hybrid-model"
    done = bash(f"{stage}.sh", "deepseek-ai/DeepSeek-R1", **environment, code=2)
    assert "it has experts and multi-latent attention and Mamba layers, and only" in done.stderr
    assert "MLM_MODEL_CKPT" in done.stderr


def test_the_defaults_are_the_documented_ones(environment):
    words = started("convert.sh", "Qwen/Qwen3-0.6B", **environment)
    work = environment["MLM_WORK_DIR"]
    assert option(words, "--pretrained-model-path") == "Qwen/Qwen3-0.6B"
    assert option(words, "--tokenizer-model") == "Qwen/Qwen3-0.6B"
    assert option(words, "--save") == f"{work}/Qwen/Qwen3-0.6B_mlm"
    assert [option(words, f"--{size}-parallel-size") for size in SIZES] == ["1"] * 5
    assert "--load" not in words
    del environment["MLM_WORK_DIR"]
    environment["TMPDIR"] = "/tmp/elsewhere"
    words = started("convert.sh", "Qwen/Qwen3-0.6B", **environment)
    assert option(words, "--save").startswith("/tmp/elsewhere/megatron_workspace/Qwen/")


def test_variables_reach_the_stage(environment, tmp_path):
    model, tokenizer = write_model(tmp_path / "a model"), tmp_path / "a tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    environment |= {
        "HF_MODEL_CKPT": str(model),
        "TOKENIZER_MODEL": str(tokenizer),
        "MLM_MODEL_SAVE": str(tmp_path / "saved here"),
        "MLM_EXTRA_ARGS": "  --seed 7\n --num-layers [0]* ",
    }
    conf = write_conf(tmp_path, 'MODEL_ARGS="--bf16"')
    done = bash(ROOT / "convert.sh", "org/model", **environment, **conf, code=2)
    assert "--num-layers [0]*" in done.stderr
    environment["MLM_EXTRA_ARGS"] = "--seed 7"
    words = started("convert.sh", "org/model", "--seed", "8", **environment, **conf)
    assert option(words, "--pretrained-model-path") == str(model)
    assert option(words, "--tokenizer-model") == str(tokenizer)
    assert option(words, "--save") == str(tmp_path / "saved here")
    assert words[-4:] == ["--seed", "7", "--seed", "8"]


def test_nothing_but_the_word_dry_run_keeps_a_launcher_from_starting(environment, tmp_path):
    words = started(
        "quantize.sh", "Qwen/Qwen3-0.6B", **environment, MLM_PROMPTS="say --dry-run twice"
    )
    assert "--prompts=say --dry-run twice" in words
    for text, cause in (
        ("MODEL_ARGS=(--bf16)\nexit 0\n", "it ends the shell"),
        ("set -e\nfalse\nMODEL_ARGS=(--bf16)\n", "it ends the shell"),
        ("MODEL_ARGS=(--bf16)\r\n", "CR LF"),
    ):
        conf = write_conf(tmp_path, text)
        assert cause in bash("convert.sh", "org/model", **environment, **conf, code=2).stderr
    conf = write_conf(tmp_path, "cd /\nSCRIPT_DIR=/\nMODEL_ARGS=(--bf16)\n")
    words = started("convert.sh", "org/model", "--save", "out", **environment, **conf)
    assert words[0] == str(ROOT / "convert.py")
    left = {"RANK": "0", "WORLD_SIZE": "2"}
    done = bash("convert.sh", "Qwen/Qwen3-0.6B", **environment, **left, code=2)
    assert "the layout has 1 process" in done.stderr


@pytest.mark.parametrize("paths", ["", ":{}/a b", "{}/a b:", ".:x"])
def test_nothing_is_imported_from_the_current_folder(environment, tmp_path, paths):
    """Even if PYTHONPATH names it: an empty entry, of a variable that was not set, does."""
    (tmp_path / "json.py").write_text("open('ran', 'w')")
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b" / "sitecustomize.py").write_text("open('named', 'w')")
    environment |= {"MLM_MODEL_CKPT": str(tmp_path), "PYTHONSAFEPATH": "1"}
    environment["PYTHONPATH"] = paths.format(tmp_path)
    bash(ROOT / "finetune.sh", "Qwen/Qwen3-0.6B", cwd=tmp_path, **environment, code=2)
    assert not (tmp_path / "ran").exists()
    assert (tmp_path / "named").exists() == ("a b" in paths)


@pytest.mark.parametrize(
    ("variable", "value", "cause"),
    [
        ("PYTHONHOME", "/nonexistent", "it does not start: "),
        ("PYTHONUTF8", "2", "invalid PYTHONUTF8"),
        ("TQDM_NCOLS", "wide", "ValueError: invalid literal for int() with base 10: 'wide'"),
        ("PYTHON", "without packages", "it has no safetensors, "),
    ],
)
def test_an_interpreter_that_cannot_run_the_stages_is_named(
    environment, tmp_path, variable, value, cause
):
    if variable == "PYTHON":
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "v"], check=True)
        value = str(tmp_path / "v" / "bin" / "python")
    done = bash("convert.sh", "Qwen/Qwen3-0.6B", **{**environment, variable: value}, code=2)
    assert cause in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('--a {"num_layers":24} --b', ["--a", '{"num_layers":24}', "--b"]),
        ("""--a '{"num_layers": 24}' --b""", ["--a", '{"num_layers": 24}', "--b"]),
        ("""--a="x  y" --b=it's""", ["--a=x  y", "--b=it's"]),
        ("""  --a 'say "hi"'\n--b '' """, ["--a", 'say "hi"', "--b", ""]),
        ("$(touch x) `id` ; * ~ $HOME", ["$(touch", "x)", "`id`", ";", "*", "~", "$HOME"]),
        (r"--a C:\new", ["--a", r"C:\new"]),
        ("", []),
    ],
)  # fmt: skip
def test_strings_are_split_at_spaces_outside_quotes_and_nothing_is_expanded(
    text, words, environment
):
    program = "set -euo pipefail; source conf/arguments.sh; a=(); to_array a T; "
    program += 'printf "%s\\0" "${a[@]}"'
    done = bash("-c", program, **environment, T=text)
    assert done.stdout.split("\0")[:-1] == (words or [""])
    assert not (ROOT / "x").exists()


def test_a_quote_that_is_not_closed_is_refused(environment):
    environment["MLM_EXTRA_ARGS"] = "--prompts 'a b"
    done = bash("quantize.sh", "Qwen/Qwen3-0.6B", **environment, code=2)
    assert "MLM_EXTRA_ARGS: 'a b" in done.stderr
    assert "not closed" in done.stderr


def test_a_megatron_checkpoint_wins_over_hugging_face(environment, tmp_path):
    checkpoint = str(write_checkpoint(tmp_path / "checkpoint"))
    words = started("convert.sh", "Qwen/Qwen3-0.6B", **environment, MLM_MODEL_CKPT=checkpoint)
    assert option(words, "--load") == checkpoint


def test_a_conf_of_the_original_works_unchanged(environment, tmp_path):
    # A file that the layer pattern would match, were it expanded as a file name.
    (tmp_path / "0-3+1-58").touch()
    conf = write_conf(tmp_path, ORIGINAL_CONF)
    words = started("convert.sh", "org/model", cwd=tmp_path, **environment, **conf)
    assert option(words, "--moe-layer-freq") == "[0]*3+[1]*58"
    assert option(words, "--pretrained-model-path") == "org/name"
    assert option(words, "--tokenizer-model") == "org/name"
    assert words[1:3] == ["--save-interval", "100000"]


def test_what_the_user_sets_wins_over_the_conf(environment, tmp_path):
    conf = write_conf(tmp_path, ORIGINAL_CONF + "TP=8\nPP=4\n")
    given = {"HF_MODEL_CKPT": "my/model", "TOKENIZER_MODEL": "my/tokenizer", "TP": "2", "PP": "1"}
    words = started("convert.sh", "org/model", **environment, **conf, **given)
    assert option(words, "--pretrained-model-path") == "my/model"
    assert option(words, "--tokenizer-model") == "my/tokenizer"
    assert option(words, "--tensor-model-parallel-size") == "2"


def test_a_conf_may_source_another_and_set_sizes(environment, tmp_path):
    write_conf(tmp_path, ORIGINAL_CONF.replace("num-layers 61", "num-layers 60"), "org/base")
    text = f'source "{tmp_path}/conf/model/org/base.sh"\nPP=2\n'
    text += 'MODEL_ARGS="$MODEL_ARGS --qk-layernorm"\n'
    conf = write_conf(tmp_path, text)
    words = started("convert.sh", "org/model", **environment, **conf)
    assert option(words, "--pipeline-model-parallel-size") == "2"
    assert words.index("--qk-layernorm") > words.index("--num-layers")


def test_a_set_up_file_is_read_first(environment, tmp_path):
    file = tmp_path / "setup.sh"
    file.write_text("[ -z ${UNSET_VARIABLE} ]\nHF_MODEL_CKPT=from/setup\nTP=2\nETP=1\n")
    words = started("convert.sh", "Qwen/Qwen3-0.6B", **environment, SANDBOX_ENV_SETUP=str(file))
    assert option(words, "--pretrained-model-path") == "from/setup"
    assert option(words, "--tensor-model-parallel-size") == "2"
    assert option(words, "--expert-tensor-parallel-size") == "1"


def test_export_is_whole_tensors_whatever_tp_says(environment, tmp_path):
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    environment |= {"MLM_MODEL_CKPT": str(checkpoint), "TP": "8", "EP": "4", "ETP": "2", "PP": "2"}
    words = started("export.sh", "Qwen/Qwen3-0.6B", **environment)
    assert [option(words, f"--{size}-parallel-size") for size in SIZES] == ["1", "2", "1", "1", "1"]
    work = environment["MLM_WORK_DIR"]
    assert option(words, "--export-dir") == f"{work}/Qwen/Qwen3-0.6B_export"


@needs_quantize
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ["--export-quant-cfg", "FP8_DEFAULT_CFG"]),
        (["NVFP4_DEFAULT_CFG"], ["--export-quant-cfg", "NVFP4_DEFAULT_CFG"]),
        (["auto"], ["--export-quant-cfg", "auto"]),
        (["--skip-generate"], ["--export-quant-cfg", "FP8_DEFAULT_CFG"]),
        (["general/ptq/fp8_default-kv_fp8"], ["--recipe", "general/ptq/fp8_default-kv_fp8"]),
    ],
)
def test_quantize_takes_a_configuration(words, expected, environment):
    shown = started("quantize.sh", "Qwen/Qwen3-0.6B", *words, **environment)
    assert option(shown, expected[0]) == expected[1]
    assert option(shown, "--save").endswith("/Qwen/Qwen3-0.6B_quant")
    flags = [word for word in words if word.startswith("-")]
    assert shown[len(shown) - len(flags) :] == flags


@needs_quantize
def test_prompts_reach_the_smoke_generation(environment):
    given = {"MLM_PROMPTS": "--Hello!|A b", "MLM_REF_LABEL": "x y|z"}
    shown = started("quantize.sh", "Qwen/Qwen3-0.6B", **environment, **given)
    assert "--prompts=--Hello!|A b" in shown
    assert "--references=x y|z" in shown


@pytest.mark.parametrize(
    ("sizes", "processes"),
    [
        ({}, 1),
        ({"TP": 8, "ETP": 1}, 8),
        ({"TP": 8}, 8),
        ({"TP": 2, "PP": 2}, 4),
        ({"TP": 2, "PP": 3, "CP": 2, "DP": 2}, 24),
        ({"EP": 8}, 8),
        ({"TP": 1, "EP": 8, "DP": 2}, 16),
        ({"TP": 8, "ETP": 1, "EP": 64}, 64),
        ({"TP": 4, "EP": 2, "ETP": 1}, 4),
        ({"TP": 4, "EP": 2}, 8),
        ({"TP": 3, "EP": 2, "ETP": 1, "DP": 2}, 6),
    ],
)
def test_the_number_of_processes_follows_from_the_sizes(sizes, processes, environment):
    program = "set -euo pipefail; source conf/arguments.sh; count_processes; echo $WORLD"
    given = {name: str(size) for name, size in sizes.items()}
    assert bash("-c", program, **environment, **given).stdout == f"{processes}\n"


@pytest.mark.parametrize(
    ("sizes", "processes"),
    [
        ({"GPUS_PER_NODE": 8}, 8),
        ({"GPUS_PER_NODE": 8, "NNODES": 2, "TP": 4}, 16),
        ({"GPUS_PER_NODE": 8, "NNODES": 2, "TP": 16}, 16),
        # Three GPUs a copy: five copies would not spread over two nodes evenly.
        ({"GPUS_PER_NODE": 8, "NNODES": 2, "TP": 3}, 12),
        ({"GPUS_PER_NODE": 2, "TP": 4}, 4),
        ({"CUDA_VISIBLE_DEVICES": "0,2,3"}, 3),
        # Without GPUs each node gets a process, and no more.
        ({"CUDA_VISIBLE_DEVICES": ""}, 1),
        ({"CUDA_VISIBLE_DEVICES": "", "NNODES": 4, "TP": 2}, 4),
        ({"CUDA_VISIBLE_DEVICES": "", "NNODES": 2, "TP": 8}, 8),
    ],
)
def test_all_copies_are_what_the_gpus_of_all_nodes_hold(sizes, processes, environment):
    program = (
        "set -euo pipefail; source conf/arguments.sh; find_nodes; count_processes; echo $WORLD"
    )
    given = {name: str(size) for name, size in sizes.items()}
    assert bash("-c", program, **environment, **given, DP="all").stdout == f"{processes}\n"


@pytest.mark.parametrize(
    ("sizes", "parts"),
    [
        ({"TP": "two"}, ["TP=two", "whole number"]),
        ({"PP": "0"}, ["PP=0", "PP=1"]),
        ({"NNODES": "0"}, ["NNODES=0", "NNODES=1"]),
        ({"TP": "3", "EP": "2", "ETP": "1"}, ["TP=3", "EP=2", "ETP=1", "neither divides"]),
    ],
)
def test_sizes_that_do_not_fit_are_explained(sizes, parts, environment):
    done = bash("convert.sh", "Qwen/Qwen3-0.6B", **environment, **sizes, code=2)
    for part in [*parts, "cause:", "remedy:"]:
        assert part in done.stderr


@pytest.fixture
def showing_python(tmp_path):
    """An interpreter that checks for real and shows what it would be started with."""
    path = tmp_path / "python"
    path.write_text(
        f'#!/bin/bash\n[[ "$*" == *--check* ]] && exec {sys.executable} "$@"\nprintf "%s\\n" "$@"\n'
    )
    path.chmod(0o755)
    return str(path)


def test_one_process_is_plain_python(environment, showing_python):
    environment["PYTHON"] = showing_python
    words = bash("convert.sh", "Qwen/Qwen3-0.6B", **environment).stdout.splitlines()
    assert words[0] == str(ROOT / "convert.py")
    assert "--check" not in words


def test_several_processes_are_torchruns_with_a_port_of_their_own(environment, showing_python):
    environment |= {"PYTHON": showing_python, "TP": "2", "PP": "2"}
    words = bash("convert.sh", "Qwen/Qwen3-0.6B", **environment).stdout.splitlines()
    run = ["-P", "-m", "torch.distributed.run", "--nproc_per_node=4", "--standalone"]
    assert words[:6] == [*run, str(ROOT / "convert.py")]
    environment["PET_RDZV_ENDPOINT"] = "head:29500"
    words = bash("convert.sh", "Qwen/Qwen3-0.6B", **environment).stdout.splitlines()
    assert words[:5] == [*run[:4], str(ROOT / "convert.py")]


def test_several_nodes_meet_at_the_first_one(environment):
    environment |= {"TP": "4", "PP": "2", "NNODES": "2"}
    given = {"NODE_RANK": "1", "MASTER_ADDR": "head", "MASTER_PORT": "29500"}
    shown = bash("convert.sh", "Qwen/Qwen3-0.6B", "--dry-run", **environment, **given).stdout
    assert (
        "-P -m torch.distributed.run --nproc_per_node=4 --nnodes=2 --node_rank=1 "
        "--master_addr=head --master_port=29500" in shown
    )
    assert "8: TP=4 PP=2 CP=1 EP=1 ETP=4 DP=1, on 2 nodes with 4 each" in shown
    done = bash("convert.sh", "Qwen/Qwen3-0.6B", **environment, NODE_RANK="0", code=2)
    assert "MASTER_ADDR (not set)" in done.stderr
    done = bash("convert.sh", "Qwen/Qwen3-0.6B", **{**environment, "NNODES": "3"}, code=2)
    assert "8 processes on 3 nodes" in done.stderr


def test_more_processes_than_gpus_are_refused(environment):
    environment |= {"TP": "8", "PP": "2", "NNODES": "2", "GPUS_PER_NODE": "4"}
    done = bash("convert.sh", "Qwen/Qwen3-0.6B", **environment, code=2)
    assert "16 processes on 2 nodes with 4 GPUs each" in done.stderr
    assert "take 4 nodes" in done.stderr


def test_the_launcher_becomes_the_stage(environment, tmp_path):
    """So that signals from a terminal or a scheduler reach it."""
    script = tmp_path / "show_pid"
    script.write_text("#!/bin/bash\necho $$\n")
    script.chmod(0o755)
    process = subprocess.Popen(
        ["bash", str(ROOT / "convert.sh"), "Qwen/Qwen3-0.6B"],
        env={**environment, "LAUNCH_SCRIPT": str(script)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.communicate(timeout=speed.scaled(60))[0] == f"{process.pid}\n"


def test_a_mistake_is_found_before_anything_is_launched(environment, tmp_path):
    done = bash(
        "convert.sh", "Qwen/Qwen3-0.6B", "--nonsense", **environment, LAUNCH_SCRIPT=SHOW, code=2
    )
    assert done.stdout == ""
    assert "--nonsense" in done.stderr


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["Qwen/Qwen3-0.6"], ["conf Qwen/Qwen3-0.6", "Did you mean: Qwen/Qwen3-0.6B"]),
        (["qwen/qwen3-8b"], ["Did you mean: Qwen/Qwen3-8B"]),
        (["xyz"], ["conf xyz", "choose one of: ", "meta-llama/Llama-3.1-8B-Instruct"]),
        ([], ["the first word names the model", "Qwen/Qwen3-0.6B"]),
        (["--load", "x"], ["the first word names the model"]),
    ],
)
def test_an_unknown_conf_is_refused_with_the_nearest_names(words, parts, environment):
    done = bash("convert.sh", *words, **environment, code=2)
    assert done.stdout == ""
    for part in [*parts, "cause:", "remedy:"]:
        assert part in done.stderr


def test_a_conf_without_flags_and_a_missing_set_up_file_are_refused(environment, tmp_path):
    conf = write_conf(tmp_path, "TP=2\n")
    done = bash("convert.sh", "org/model", **environment, **conf, code=2)
    assert "does not set MODEL_ARGS" in done.stderr
    done = bash("convert.sh", "x/y", **environment, SANDBOX_ENV_SETUP="/no/file", code=2)
    assert "SANDBOX_ENV_SETUP=/no/file" in done.stderr


def test_export_without_a_checkpoint_says_which_variable_to_set(environment):
    assert "MLM_MODEL_CKPT" in bash("export.sh", "Qwen/Qwen3-0.6B", **environment, code=2).stderr


@pytest.mark.parametrize("script", sorted(path.name for path in ROOT.glob("*.sh")))
def test_help_is_shown_without_a_conf(script, environment):
    stage = ROOT / script.replace(".sh", ".py")
    if script == "quickstart.sh" or not stage.exists():
        pytest.skip("not a stage")
    done = bash(script, "--help", **environment)
    assert "--check" in done.stdout


def test_tokens_are_never_shown(environment, tmp_path):
    environment |= {"HF_TOKEN": "hf_verysecretverysecret", "LAUNCH_SCRIPT": SHOW}
    good = bash("convert.sh", "Qwen/Qwen3-0.6B", **environment)
    bad = bash("convert.sh", "Qwen/Qwen3-0.6", **environment, code=2)
    assert "verysecret" not in good.stdout + good.stderr + bad.stdout + bad.stderr


@pytest.mark.parametrize("file", ["conf/arguments.sh", "conf/environment.sh"])
def test_sourcing_defines_and_does_not_act(file, environment):
    see = "see() { env | grep -v ^_=; set +o; }; before=$(see)"
    program = f'{see}; source {file}; diff <(echo "$before") <(see)'
    done = bash("-c", program, **environment)
    assert done.stdout + done.stderr == ""


def test_a_launcher_is_at_most_40_lines():
    for path in ROOT.glob("*.sh"):
        if path.with_suffix(".py").exists():
            assert len(path.read_text().splitlines()) <= 40, path


# ---------------------------------------------------------------- conf/environment.sh


@pytest.fixture
def fresh_machine(tmp_path):
    """A checkout with empty requirements, on a machine whose only fitting Python is 3.12's."""
    root = tmp_path / "checkout"
    (root / "conf").mkdir(parents=True)
    (root / "conf" / "environment.sh").write_text((ROOT / "conf" / "environment.sh").read_text())
    (root / "requirements.txt").write_text("# nothing\n")
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "cat", "dirname", "sha256sum", "mkdir"):
        (tools / tool).symlink_to(f"/usr/bin/{tool}")
    environment = {"PATH": str(tools), "HOME": str(tmp_path), "PYENV_ROOT": str(tmp_path / "none")}
    return root, tools, environment


SET_UP = "set -euo pipefail; source conf/environment.sh; setup_environment; echo $PYTHON"


def test_an_environment_is_made_once_and_then_reused(fresh_machine):
    root, tools, environment = fresh_machine
    (tools / "python3.12").symlink_to(Path(sys.base_prefix) / "bin" / "python3")
    first = bash("-c", SET_UP, cwd=root, **environment)
    assert first.stdout == f"{root}/.venv/bin/python\n"
    assert "installing requirements.txt" in first.stderr
    second = bash("-c", SET_UP, cwd=root, **environment)
    assert second.stdout == first.stdout
    assert second.stderr == ""
    (root / "requirements.txt").write_text("# changed\n")
    third = bash("-c", SET_UP, cwd=root, **environment)
    assert "installing requirements.txt" in third.stderr
    assert "creating" not in third.stderr


def test_without_a_python_that_fits_the_message_says_what_to_install(fresh_machine):
    root, _, environment = fresh_machine
    done = bash("-c", SET_UP, cwd=root, **environment, code=2)
    assert "Python 3.12 (not found)" in done.stderr
    assert "pyenv install 3.12" in done.stderr


def test_skip_install_installs_nothing(fresh_machine):
    root, tools, environment = fresh_machine
    (tools / "python3.12").symlink_to(Path(sys.base_prefix) / "bin" / "python3")
    done = bash("-c", SET_UP, cwd=root, **environment, MLM_SKIP_INSTALL="1", code=2)
    assert "MLM_SKIP_INSTALL=1" in done.stderr
    assert not (root / ".venv").exists()


def test_an_environment_that_fits_is_used_as_it_is(environment):
    done = bash("-c", SET_UP, **environment)
    assert done.stdout == f"{sys.executable}\n"
    assert done.stderr == ""
