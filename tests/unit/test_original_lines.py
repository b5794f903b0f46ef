"""The command lines of Megatron-LM's README.md and ADVANCED.md are planned, or refused by name.

A line is its script, words and variables, as a user would type them; the paths are our own. Stages
are planned as ``--dry-run`` plans them: nothing that an earlier line makes is there.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
from confs import ROOT
from launchers import bash, planned
from model_folders import write_checkpoint, write_model

from post_training.cli import dry_run
from post_training.common.errors import UsageError
from post_training.config import other_stages
from post_training.config.parser import make_parser
from post_training.inference import options as prompt_options

LLAMA = "meta-llama/Llama-3.2-1B-Instruct"
HUB = {"HF_MODEL_CKPT": "org/name"}
MADE = {"MLM_MODEL_CKPT": "{work}/made"}  # by an earlier line
OFFLINE = "--export-offline-model --offline-distillation-data {work}/features"
# What the lines are about -> script, words, variables.
LINES = {
    "NVFP4": ("quantize.sh", [LLAMA, "NVFP4_DEFAULT_CFG"], {**HUB, "TP": "1"}),
    "its export": ("export.sh", [LLAMA], {**HUB, **MADE, "PP": "1", "EXPORT_DIR": "{work}/out"}),
    "export for a simulation in vLLM": (
        "export.sh",
        [LLAMA],
        {**HUB, **MADE, "PP": "1", "MLM_EXTRA_ARGS": "--export-vllm-fq"},
    ),
    "keys and values": (
        "quantize.sh",
        [LLAMA, "NVFP4_DEFAULT_CFG"],
        {**HUB, "MLM_EXTRA_ARGS": "--export-kv-cache-quant fp8"},
    ),
    "a search": (
        "quantize.sh",
        [LLAMA, "auto"],
        {**HUB, "TP": "1", "MLM_EXTRA_ARGS": "--auto-quantize-bits 4.0"},
    ),
    "an online draft": (
        "eagle3.sh",
        [LLAMA],
        {**HUB, "TP": "1", "MLM_MODEL_SAVE": "{work}/eagle3"},
    ),
    "a draft to extract features for": (
        "convert.sh",
        [LLAMA],
        {**HUB, "MLM_MODEL_SAVE": "{work}/eagle3", "MLM_EXTRA_ARGS": "--algorithm eagle3"},
    ),
    "features": (
        "offline_feature_extract.sh",
        [LLAMA],
        {**MADE, "MLM_EXTRA_ARGS": "--output-dir {work}/features"},
    ),
    "an offline draft": (
        "convert.sh",
        [LLAMA],
        {**HUB, "MLM_EXTRA_ARGS": "--algorithm eagle3 --export-offline-model"},
    ),
    "its training": ("finetune.sh", [LLAMA], {**MADE, "MLM_EXTRA_ARGS": OFFLINE}),
    "export of an offline draft": (
        "export.sh",
        [LLAMA],
        {**HUB, **MADE, "EXPORT_DIR": "{work}/out", "MLM_EXTRA_ARGS": "--export-offline-model"},
    ),
    "pruning": (
        "prune.sh",
        ["Qwen/Qwen3-8B"],
        {**HUB, "PP": "1", "MLM_EXTRA_ARGS": '--prune-export-config {"num_layers":24}'},
    ),
    "pruning, on text without a gate": (
        "prune.sh",
        ["Qwen/Qwen3-8B"],
        {
            **HUB,
            "PP": "5",
            "MLM_EXTRA_ARGS": "--calib-dataset cnn_dailymail --prune-intermediate-ckpt {work}/s "
            "--decoder-first-pipeline-num-layers 6 --decoder-last-pipeline-num-layers 6 "
            '--prune-export-config {"num_layers":24}',
        },
    ),
    "a pruned model's score": (
        "mmlu.sh",
        ["Qwen/Qwen3-8B"],
        {**MADE, "MLM_EXTRA_ARGS": "--num-layers 24"},
    ),
    "answers": ("generate.sh", [LLAMA], {**MADE, "TP": "1"}),
    "a score": ("mmlu.sh", [LLAMA], {**MADE, "TP": "1"}),
    "training a draft that is there": ("finetune.sh", [LLAMA], {**MADE, "TP": "1"}),
    "the model and format of a set-up file": (
        "quantize.sh",
        [LLAMA, "FP8_DEFAULT_CFG"],
        {"SANDBOX_ENV_SETUP": "{work}/setup.sh"},
    ),
    "a checkpoint by the name of the documents": (
        "mmlu.sh",
        [LLAMA],
        {"MLM_MODEL_LOAD": "{work}/made"},
    ),
    "Kimi-K2's draft": (
        "eagle3.sh",
        ["moonshotai/Kimi-K2-Instruct"],
        {**MADE, "TP": "8", "ETP": "1", "EP": "64"},
    ),
    "Kimi-K2's export": (
        "export.sh",
        ["moonshotai/Kimi-K2-Instruct"],
        {
            **MADE,
            "PP": "16",
            "MLM_EXTRA_ARGS": "--decoder-first-pipeline-num-layers 3 "
            "--decoder-last-pipeline-num-layers 2 --init-model-with-meta-device "
            "--use-cpu-initialization",
        },
    ),
}


@pytest.fixture
def work(tmp_path):
    """The folder that ``{work}`` stands for, with a set-up file."""
    (tmp_path / "setup.sh").write_text("HF_MODEL_CKPT=org/name\nTP=1\nETP=1\nEP=1\nPP=1\n")
    return tmp_path


def plan_of(script, words, variables, environment, work):
    given = {name: text.replace("{work}", str(work)) for name, text in variables.items()}
    return planned(script, *words, **{**environment, **given})


@pytest.mark.parametrize("line", LINES)
def test_a_line_of_the_documents_is_planned(line, environment, work, capsys):
    script, words, variables = LINES[line]
    plan = plan_of(script, words, variables, environment, work)
    dry_run.show(plan.options, plan.source)
    assert "launch line" in capsys.readouterr().out
    loads = {"MLM_MODEL_CKPT", "MLM_MODEL_LOAD"} & variables.keys()
    assert plan.source.is_checkpoint == bool(loads)


def refused(environment, work, script, *words, **variables) -> UsageError:
    with pytest.raises(UsageError) as error:
        plan_of(script, words, variables, environment, work)
    return error.value


# ---------------------------------------------------------------- what a flag does


def notices(environment, script, *words, **variables) -> str:
    return "\n".join(planned(script, *words, **environment, **variables).options.notices)


def test_a_search_may_be_named_in_three_ways(environment):
    for name in ("auto", "AUTO", "auto_quantize"):
        assert planned("quantize.sh", LLAMA, name, **environment).choice == "auto"


def test_the_searchs_formats_are_words_or_one_word_with_commas(environment):
    for formats in (["NVFP4_DEFAULT_CFG", "FP8_DEFAULT_CFG"], ["nvfp4,fp8"]):
        words = ("auto", "--auto-quantize-formats", *formats)
        plan = planned("quantize.sh", LLAMA, *words, **environment)
        names = [each.name for each in plan.options.auto.formats]
        assert names == ["NVFP4_DEFAULT_CFG", "FP8_DEFAULT_CFG"]


@pytest.mark.parametrize(("given", "used"), [("4.0", 4.5), ("4.8", 4.8), ("4.5", 4.5)])
def test_bits_without_room_for_scales_mean_the_smallest_format(given, used, environment):
    plan = planned("quantize.sh", LLAMA, "auto", "--auto-quantize-bits", given, **environment)
    assert plan.options.auto.bits == used
    assert bool(plan.options.notices) == (used != float(given))


def test_too_few_bits_are_refused(environment, work):
    error = refused(environment, work, "quantize.sh", LLAMA, "auto", "--auto-quantize-bits", "3.9")
    assert "between 4.5 and 16 bits a weight, scales included" in error.cause


def test_bits_beside_a_formats_name_ask_for_a_search(environment, work):
    words = (LLAMA, "fp8", "--auto-quantize-bits", "5")
    plan = planned("quantize.sh", *words, **environment)
    assert plan.choice == "auto"
    assert "--export-quant-cfg fp8 is not used" in plan.options.notices[0]
    words = (LLAMA, "general/ptq/fp8_default-kv_fp8", "--auto-quantize-bits", "5")
    assert "--auto-quantize-bits 5" in refused(environment, work, "quantize.sh", *words).what
    said = notices(environment, "quantize.sh", LLAMA, "--auto-quantize-method", "kl_div")
    assert said == "unused without auto or --auto-quantize-bits: --auto-quantize-method"


def test_progress_bars_may_be_turned_off_everywhere(environment):
    for stage in ("mmlu", "generate", "convert"):
        plan = planned(f"{stage}.sh", LLAMA, "--disable-tqdm", **environment)
        assert plan.options.disable_tqdm and not plan.options.notices


def test_prompts_may_be_named_as_training_data_is(environment, tmp_path):
    rows = [{"prompt": f"What is {i}?"} for i in range(5)]
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path in files:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("--osl", "7", "--fraction", "0.7", "--finetune-data-files", *files)
    plan = planned("generate.sh", LLAMA, *words, **environment)
    assert plan.options.max_new_tokens == 7
    read = prompt_options.load(plan.options.prompts, plan.options.prompts.fraction)
    assert [(each.number, each.id) for each in read.dialogues] == [(i, i) for i in range(7)]
    assert plan.settings["further_prompts"][0]["path"].endswith("b.jsonl")
    words = ("--finetune-hf-dataset", "org/chat", "--finetune-data-split", "test")
    prompts = planned("generate.sh", LLAMA, *words, **environment).options.prompts
    assert (prompts.sources, prompts.split) == (("org/chat",), "test")


def test_prompts_that_are_named_twice_are_refused(environment, work):
    words = (LLAMA, "--finetune-data-files", "x.jsonl")
    error = refused(environment, work, "generate.sh", *words, PROMPTS_PATH="org/chat")
    assert "each says where the prompts are" in error.cause


def test_a_draft_of_any_length_gives_the_same_answers(environment):
    assert "validate.sh" in notices(environment, "generate.sh", LLAMA, DRAFT_LEN="3")
    assert not notices(environment, "generate.sh", LLAMA, DRAFT_LEN="0")


def test_flags_of_other_stages_are_named_once_as_unused(environment):
    words = ("--few-shots", "5", "--few-shots", "3", "--export-kv-cache-quant", "fp8")
    words += ("--modelopt-enabled", "--export-legacy-megatron", "--finetune-data-files", "a", "b")
    words += ("--qad-train-target", "mtp", "--freeze-base-for-mtp")
    (said,) = planned("convert.sh", LLAMA, *words, **environment).options.notices
    assert said.startswith("unused here: --few-shots (a flag of mmlu), --export-kv-cache-quant")
    assert said.count("--few-shots") == 1
    for flag in ("--modelopt-enabled", "--export-legacy-megatron", "--freeze-base-for-mtp"):
        assert flag in said


def test_every_flag_of_a_stage_is_accepted_by_every_other():
    """With as many values as the stages that read it take."""
    readers: dict[str, list[str]] = {}
    for path in sorted(ROOT.glob("*.py")):
        stage = importlib.import_module(path.stem).STAGE
        parser = make_parser(stage.name, stage.options, show_all=False)
        for flag, (count, _) in other_stages.UNUSED.items():
            given = {0: [], 1: ["1"], "+": ["1", "2"], "?": ["true"]}[count]
            try:
                values = parser.split([flag, *given])[1]
            except UsageError as error:  # a name that the stage does not know
                assert "the values are" in error.cause
                values = {}
            readers.setdefault(flag, [])
            if values.get("unused_flags") != [flag]:
                readers[flag].append(stage.name)
    nowhere = {flag for flag, stages in readers.items() if not stages}
    assert nowhere == {"--modelopt-enabled", "--export-legacy-megatron"}
    assert max(map(len, readers.values())) < len(list(ROOT.glob("*.py")))


def test_original_training_arguments_are_understood(environment):
    """What Megatron-LM's eagle3.sh passes by default, the switch --eod-mask-loss included."""
    groups = {
        "MLM_DATA_ARGS": "--train-samples 128000 --lr-decay-samples 128000 --lr-warmup-samples 0 "
        "--split 100,0,0 --finetune-hf-dataset org/chat",
        "MLM_TRAIN_ARGS": "--no-gradient-accumulation-fusion --reset-position-ids "
        "--reset-attention-mask --eod-mask-loss --micro-batch-size 1 --attention-dropout 0.0 "
        "--hidden-dropout 0.0 --no-check-for-nan-in-loss-and-grad --attention-backend auto",
        "MLM_OPTIM_ARGS": "--lr 5.0e-5 --min-lr 1.0e-7 --lr-decay-style cosine --clip-grad 1.0 "
        "--weight-decay 0.0 --adam-beta1 0.9 --adam-beta2 0.95 --init-method-std 0.010 "
        "--use-distributed-optimizer",
        "MLM_EVAL_ARGS": "--eval-iters 1 --eval-interval 1000 --save-interval 1000",
    }
    plan = planned("eagle3.sh", LLAMA, **environment, **groups)
    assert plan.training.train_iters == 128_000
    assert plan.options.text.finetune_hf_dataset == "org/chat"


def test_the_variable_dataset_names_the_data(environment):
    for stage, words in (("eagle3", ()), ("extract_features", ("--output-dir", "features"))):
        plan = planned(f"{stage}.sh", LLAMA, *words, **environment, DATASET="org/chat")
        assert plan.options.text.finetune_hf_dataset == "org/chat"


# ---------------------------------------------------------------- what is refused


@pytest.fixture
def distilled(environment, tmp_path):
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    return {**environment, "TEACHER_CKPT": str(teacher), "MLM_MODEL_CKPT": str(student)}


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (("--data-path", "1.0", "blend_text_document"), "indexed data sets"),
        (("--per-split-data-args-path", "blend.json", "--sft"), "indexed data sets"),
        (("--mock-data",), "random tokens"),
        (("--export-kd-teacher-ckpt-format", "torch"), "only checkpoints in torch_dist"),
        (("--offline-distillation-data", "features"), "for training a draft"),
        (("--qad-train-target", "mtp"), "MTP heads are not trained"),
        (("--freeze-base-for-mtp",), "MTP heads are not trained"),
    ],
)
def test_distill_refuses_data_and_targets_that_it_cannot_train_on(words, cause, distilled, work):
    assert cause in refused(distilled, work, "distill.sh", LLAMA, *words).cause


def test_a_blend_of_indexed_data_sets_is_refused(distilled, work):
    error = refused(distilled, work, "distill.sh", LLAMA, BLEND_PATH="/data/blend.json")
    assert error.what == "--per-split-data-args-path"


def test_distill_takes_what_changes_nothing(distilled, tmp_path, work):
    words = ("--export-kd-teacher-ckpt-format", "torch_dist", "--qad-train-target", "base")
    (said,) = planned(
        "distill.sh", LLAMA, *words, "--export-kd-teacher-model-config", "t.yaml", **distilled
    ).options.notices
    assert "--export-kd-teacher-model-config t.yaml is unused" in said
    write_checkpoint(Path(distilled["TEACHER_CKPT"]))
    words = ("--export-kd-teacher-model-config", "t.yaml")
    assert "has none" in refused(distilled, work, "distill.sh", LLAMA, *words).cause


def test_finetune_trains_the_draft_of_a_model_that_has_one_and_others_themselves(environment, work):
    plain, drafted = work / "plain", work / "with a draft"
    write_checkpoint(plain, stage="convert")
    write_checkpoint(drafted, stage="eagle3", draft={"algorithm": "eagle3"})
    words = {}
    for model in (plain, drafted):
        given = {**environment, "MLM_MODEL_CKPT": str(model), "MLM_LAUNCH": "words"}
        words[model] = bash("finetune.sh", LLAMA, **given).stdout.split("\0")
    assert "--no-new-draft" in words[drafted] and "--no-new-draft" not in words[plain]
    assert words[drafted][words[drafted].index("--save") + 1] == str(drafted)
    assert words[plain][words[plain].index("--save") + 1].endswith("_finetuned")


def test_extra_model_path_means_the_drafts_weights_where_a_draft_is_attached(environment, work):
    weights = work / "eagle.pt"
    weights.write_bytes(b"x")
    words = (LLAMA, "--algorithm", "eagle3", "--extra-model-path")
    assert "pickled" in refused(environment, work, "convert.sh", *words, weights).cause
    checkpoint = write_checkpoint(work / "drafted")
    error = refused(environment, work, "convert.sh", *words, checkpoint)
    assert error.what.startswith("--draft-model-path")
    folder = write_model(work / "folder")
    words = (LLAMA, "--extra-model-path", folder)
    assert planned("convert.sh", *words, **environment).options.extra_model_path == folder
