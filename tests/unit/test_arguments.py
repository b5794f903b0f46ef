"""The command line: every flag, every conf with every stage, and what mistakes say."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from confs import CONFS, ROOT, conf_flags, parse, run_checks, values

from post_training.common import inputs
from post_training.common.errors import UsageError
from post_training.config import arguments, megatron_spellings
from post_training.config.flags import flag, spelled
from post_training.config.options import StageOptions
from post_training.config.parser import make_parser, numbers
from post_training.models import transformer_fields

STAGES = sorted(path.stem for path in ROOT.glob("*.py"))
# As Megatron-LM's confs are written: what is spelled in them must be understood.
ORIGINAL_STYLE = {
    "dense": """--save-interval 100000 --micro-batch-size 1 --bf16 --no-masked-softmax-fusion
        --disable-bias-linear --untie-embeddings-and-output-weights
        --use-rotary-position-embeddings --rotary-percent 1.0 --no-rope-fusion
        --no-position-embedding --normalization RMSNorm --swiglu --num-layers 32
        --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32
        --group-query-attention --num-query-groups 8 --seq-length 4096
        --max-position-embeddings 8192 --tokenizer-type HuggingFaceTokenizer
        --make-vocab-size-divisible-by 1 --use-mcore-models --rotary-base 500000
        --use-rope-scaling --no-bias-swiglu-fusion --export-force-local-attention""",
    "latent attention and experts": """--multi-latent-attention --kv-lora-rank 512
        --v-head-dim 128 --q-lora-rank 1536 --qk-head-dim 128 --qk-layernorm
        --qk-pos-emb-head-dim 64 --num-experts 256 --moe-layer-freq [0]*3+[1]*58
        --moe-ffn-hidden-size 2048 --moe-router-dtype fp32 --moe-router-score-function sigmoid
        --moe-router-bias-update-rate 1e-3 --moe-router-enable-expert-bias --moe-router-topk 8
        --moe-router-num-groups 8 --moe-router-group-topk 4 --moe-router-pre-softmax
        --moe-router-topk-scaling-factor 2.5 --moe-shared-expert-overlap
        --moe-shared-expert-intermediate-size 2048 --moe-aux-loss-coeff 1e-4
        --moe-router-load-balancing-type seq_aux_loss --moe-token-dispatcher-type alltoall
        --moe-token-drop-policy probs --rotary-scaling-factor 40 --mscale 1.0
        --mscale-all-dim 1.0 --recompute-activations --moe-layer-recompute
        --sequence-parallel""",
    "windows and clamped activations": """--quick-geglu --glu-linear-offset 1.0
        --softmax-type learnable --window-attn-skip-freq 2 --enable-gpt-oss
        --activation-func-clamp-value 7.0 --window-size 127,0 --no-bias-gelu-fusion
        --no-bias-dropout-fusion --padded-vocab-size 201088""",
    "hybrid": """--trust-remote-code --enable-experimental --moe-permute-fusion
        --use-fused-weighted-squared-relu --cross-entropy-loss-fusion
        --cross-entropy-fusion-impl native --moe-grouped-gemm --attention-backend flash
        --disable-gloo-process-groups --is-hybrid-model --mamba-num-heads 64 --mamba-head-dim 64
        --hybrid-override-pattern MEMEM*EMEMEM*E --init-method-std 0.0173 --squared-relu
        --position-embedding-type none --attention-dropout 0.0 --hidden-dropout 0.0
        --moe-latent-size 1024 --export-model-type MambaModel""",
    "others": """--export-qk-l2-norm --export-moe-apply-probs-on-input --apply-layernorm-1p
        --rotary-interleaved --no-rope-freq 4 --auto-detect-ckpt-format --finetune
        --export-te-mcore-model --export-default-te-spec --init-model-with-meta-device
        --use-cpu-initialization --distributed-timeout-minutes 30
        --decoder-first-pipeline-num-layers 6 --decoder-last-pipeline-num-layers 7
        --tensor-model-parallel-size 1 --expert-tensor-parallel-size 1""",
}


@pytest.mark.parametrize("conf", CONFS)
@pytest.mark.parametrize("stage", STAGES)
def test_every_conf_is_understood_by_every_stage(conf, stage):
    declared = importlib.import_module(stage).STAGE
    arguments.parse(declared.name, declared.options, [*conf_flags(conf), "--check"])


@pytest.mark.parametrize("conf", CONFS)
def test_a_conf_holds_architecture_only(conf):
    args = parse(*conf_flags(conf))
    other_names = {"padded_vocab_size", "untie_embeddings_and_output_weights"}
    other_names |= {"group_query_attention", "export_model_type"}
    assert set(args.given) - set(args.stated) - other_names == {"bf16"}


@pytest.mark.parametrize("text", ORIGINAL_STYLE.values(), ids=ORIGINAL_STYLE)
def test_flags_of_the_originals_confs_are_understood(text):
    parse(*text.split())


@pytest.fixture(scope="module")
def parser():
    return make_parser("convert", StageOptions, show_all=False)


@pytest.mark.parametrize("name", transformer_fields.load())
def test_every_field_of_the_configuration_is_a_flag(name, parser):
    entry = transformer_fields.load()[name]
    flag = "--" + name.replace("_", "-")
    if flag in megatron_spellings.WITHOUT_MEANING:
        pytest.skip("accepted without meaning")
    if entry["type"] == "bool":
        assert parser.split([flag])[1] == {name: True}
        assert parser.split([f"--no{flag[1:]}"])[1] == {name: False}
        return
    text, value = {
        "int": ("3", 3),
        "float": ("0.5", 0.5),
        "str": ("x", "x"),
        "numbers": ("[0]*2+[1]", [0, 0, 1]),
        "words": ("a", "a"),
        "floats": ("0.5", 0.5),
    }.get(entry["type"]) or (str(entry["choices"][-1]), entry["choices"][-1])
    assert parser.split([flag, text])[1] == {name: value}


def test_flags_json_is_what_megatron_core_has():
    program = (
        "import sys; sys.path.append('tests/helpers'); import flags_table as t;"
        "assert t.generate() == t.FILE.read_text(encoding='utf-8'),"
        "'run: PYTHONPATH=. python tests/helpers/flags_table.py'"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_defaults_are_megatron_cores():
    args = parse()
    table = json.loads(transformer_fields.FILE.read_text(encoding="utf-8"))
    skipped = {name.lstrip("-").replace("-", "_") for name in megatron_spellings.WITHOUT_MEANING}
    assert {n: values()[n] for n in table if n not in skipped} == {
        n: e["default"] for n, e in table.items() if n not in skipped
    }
    assert args.given == {}


@pytest.mark.parametrize(
    ("flag", "fields"),
    [
        ("--disable-bias-linear", {"add_bias_linear": False}),
        ("--swiglu", {"gated_linear_unit": True, "activation_func": "silu"}),
        ("--quick-geglu", {"gated_linear_unit": True, "activation_func": "quick_gelu"}),
        ("--squared-relu", {"activation_func": "squared_relu"}),
        ("--apply-layernorm-1p", {"layernorm_zero_centered_gamma": True}),
        ("--no-rope-fusion", {"apply_rope_fusion": False}),
        ("--no-masked-softmax-fusion", {"masked_softmax_fusion": False}),
        ("--no-bias-swiglu-fusion", {"bias_activation_fusion": False}),
        ("--use-rotary-position-embeddings", {"position_embedding_type": "rope"}),
        ("--use-rope-scaling", {"rope_scaling": True}),
        ("--export-qk-l2-norm", {"qk_l2_norm": True}),
        ("--export-moe-apply-probs-on-input", {"moe_apply_probs_on_input": True}),
        ("--no-initialization", {"perform_initialization": False}),
    ],
)
def test_megatron_lms_spellings_set_the_fields(flag, fields):
    assert parse(flag).given == fields


@pytest.mark.parametrize(
    ("flag", "value", "field"),
    [
        ("--norm-epsilon", 1e-6, "layernorm_epsilon"),
        ("--num-experts", 8, "num_moe_experts"),
        ("--recompute-num-layers-per-stage", 2, "recompute_num_layers"),
        ("--decoder-first-pipeline-num-layers", 6, "num_layers_in_first_pipeline_stage"),
        ("--hybrid-override-pattern", "M*M*", "hybrid_layer_pattern"),
    ],
)
def test_megatron_lms_other_names_take_values(flag, value, field):
    assert parse(flag, str(value)).given == {field: value}


def test_a_flag_without_meaning_is_accepted_and_reported_once():
    options = parse("--use-mcore-models", "--save-interval", "9", "--save-interval", "10")
    assert options.ignored_flags == ("--use-mcore-models", "--save-interval")


def test_a_hybrid_models_pattern_tells_the_number_of_layers():
    assert parse("--hybrid-layer-pattern", "M-M*|M-M*/*E").stated["num_layers"] == 8


def test_the_last_value_of_a_flag_wins():
    assert values("--num-layers", "28", "--num-layers", "24")["num_layers"] == 24
    assert values("--swiglu", "--activation-func", "gelu")["activation_func"] == "gelu"
    assert values("--qk-layernorm", "--no-qk-layernorm")["qk_layernorm"] is False


@pytest.mark.parametrize(
    "stage, name",
    [
        ("convert", "extra_model_path"),
        ("mmlu", "mmlu_output"),
        ("validate", "ground_truth_path"),
        ("validate", "save_ground_truth_path"),
        ("validate", "validate_output"),
    ],
)
def test_an_empty_path_is_one_that_was_not_given(stage, name):
    """A script's unset variable, ``--mmlu-output "$REPORT"``, is not the current folder."""
    declared = importlib.import_module(stage).STAGE
    options = arguments.parse(declared.name, declared.options, [spelled(name), ""])
    assert getattr(options, name) is None


def test_fp32_overrides_the_precision_of_a_conf():
    assert parse().precision == "bf16"
    assert parse("--bf16").precision == "bf16"
    assert parse("--fp16").precision == "fp16"
    assert parse("--fp32", "--bf16").precision == "fp32"


def test_sequence_parallel_means_nothing_at_tp_1():
    assert parse("--sequence-parallel").sequence_parallel is False


def test_run_time_choices_are_apart_from_the_model():
    args = parse("--bf16", "--num-layers", "2", "--no-rope-fusion", "--recompute-activations")
    assert args.build.overrides == {
        "apply_rope_fusion": False,
        "recompute_granularity": "selective",
    }
    assert args.stated == {"num_layers": 2}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4", 4),
        ("-1", -1),
        ("127,0", [127, 0]),
        ("(127,0)", [127, 0]),
        ("[0,1,1]", [0, 1, 1]),
        ("[0]*3+[1]*2", [0, 0, 0, 1, 1]),
        ("([0]*1+[1]*2)*2", [0, 1, 1, 0, 1, 1]),
    ],
)
def test_lists_of_numbers_are_read_without_evaluating_code(text, value):
    assert numbers(text) == value


@pytest.mark.parametrize("text", ["", "x", "[0]*", "__import__('os')", "[0]*999999999", "[[1]]"])
def test_other_text_is_no_list_of_numbers(text, capsys):
    expect_usage_error(capsys, "--moe-layer-freq", text, contains=["--moe-layer-freq", "[0]*3"])


def expect_usage_error(capsys, *words: str, contains: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_checks(*words)
    printed = capsys.readouterr()
    assert stopped.value.code == 2
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert "\n  cause: " in printed.err
    assert "\n  remedy: " in printed.err
    for part in contains:
        assert part in printed.err


@pytest.mark.parametrize(
    ("words", "contains"),
    [
        (["--num-layer", "3"], ["--num-layer\n", "Did you mean: --num-layers"]),
        (["--nrom-epsilon=1"], ["--nrom-epsilon\n", "--norm-epsilon"]),
        (["--zzzzzz", "--yyyyyy"], ["--zzzzzz", "--yyyyyy", "--help-all"]),
        (["-x"], ["-x\n"]),
        (["stray"], ["'stray'", "a flag is expected"]),
        (["--moe-expert-capacity-factor", "1"], ["--moe-expert-capacity-factor\n", "computes"]),
        (["--use-mup"], ["--use-mup\n", "computes something else"]),
        (["--moe-router-topk-limited-devices", "2"], ["--moe-router-topk-limited-devices\n"]),
        (["--moe-router-load-balancing-type", "none", "sinkhorn"], ["load-balancing", "computes"]),
        (["--moe-router-load-balancing-type", "sinkhorn"], ["load-balancing", "computes"]),
        (["--moe-router-load-balancing-type", "quantile_balancing"], ["load-balancing", "known"]),
        (["--moe-router-load-balancing-type", "aux_los"], ["load-balancing", "seq_aux_loss"]),
        (["--fp8-format", "e4m3"], ["--fp8 (--fp8-format)", "FP8", "quantize.sh"]),
        (["--fp4-format", "e2m1"], ["--fp4 (--fp4-format)", "quantize.sh"]),
        (["--config-logger-dir", "x"], ["--config-logger-dir\n", "pickled"]),
        (["--test-mode"], ["--test-mode\n", "own tests"]),
        (["--cache-mla-latents"], ["--cache-mla-latents\n", "inference engine"]),
        (["--cuda-graph-impl", "local"], ["--cuda-graph-impl\n", "CUDA graphs"]),
        (["--num-layers", "many"], ["--num-layers many", "a whole number"]),
        (["--norm-epsilon", "small"], ["small", "a number"]),
        (["--num-layers"], ["--num-layers", "expected one argument"]),
        (["--export-model-type", "GTPModel"], ["GTPModel", "Did you mean: GPTModel"]),
        (["--normalization", "rmsnorm"], ["rmsnorm", "Did you mean: RMSNorm"]),
        (["--flash-attention-version", "7"], ["7", "2, 3, 4"]),
        (["--tokenizer-type", "NullTokenizer"], ["NullTokenizer", "HuggingFaceTokenizer"]),
        (["--tensor-model-parallel-size", "0"], ["TP=0", "TP=1"]),
        (["--tensor-model-parallel-size", "2"], ["TP=2", "number of those started is 1"]),
        (["--check", "--expert-model-parallel-size", "2", "--tensor-model-parallel-size", "3",
          "--expert-tensor-parallel-size", "1"], ["TP=3", "3 processes", "ETP=1"]),
    ],
)  # fmt: skip
def test_a_mistake_exits_2_with_value_cause_and_remedy(words, contains, capsys):
    expect_usage_error(capsys, *words, contains=contains)


def test_a_stages_own_check_is_reported_the_same_way(capsys):
    def check(args):
        raise UsageError("--x 1", "because", "do that")

    with pytest.raises(SystemExit) as stopped:
        run_checks(check=check)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: --x 1\n  cause: because\n  remedy: do that\n"


def test_what_is_not_utf8_is_refused_before_it_reaches_run_json(monkeypatch, tmp_path):
    with pytest.raises(UsageError, match=r"/new\\xff(?s:.*)it is not UTF-8 text"):
        parse("--save", "/new\udcff")
    folder = tmp_path / "f\udce9"
    folder.mkdir()
    monkeypatch.chdir(folder)
    with pytest.raises(UsageError, match="it is not UTF-8 text"):
        parse("--save", "new")


def test_a_home_of_nobody_is_a_path_that_is_not_there():
    assert inputs.expanded("~nobody-of-this-name/x") == Path("~nobody-of-this-name/x")
    assert inputs.expanded("~/x") == Path.home() / "x"


def test_of_several_processes_the_first_reports(capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as stopped:
        run_checks("--nonsense")
    assert stopped.value.code == 2
    assert capsys.readouterr().err == ""


def test_check_prints_nothing_and_starts_nothing(capsys):
    run_checks("--check", "--tensor-model-parallel-size", "2")
    assert capsys.readouterr() == ("", "")


def test_the_number_of_processes_gives_the_data_parallel_size(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "8")
    sizes = parse(
        "--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"
    ).parallel
    assert (sizes.tensor, sizes.pipeline, sizes.data, sizes.expert_tensor) == (2, 2, 2, 2)
    assert sizes.world == 8


def test_help_is_short_and_help_all_is_complete(capsys):
    for asked in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as stopped:
            parse(asked)
        assert stopped.value.code == 0
    text = capsys.readouterr().out
    short, _, everything = text.partition("usage:")[2].partition("usage:")
    assert "--load" in short
    assert "--num-layers" not in short
    for name in transformer_fields.load():
        assert "--" + name.replace("_", "-") in everything


@dataclass(frozen=True, kw_only=True)
class OwnSeed(StageOptions):
    seed: str = flag("own", help="my seed")


def test_a_stages_own_flag_replaces_a_common_one_and_stands_first(capsys):
    assert arguments.parse("convert", OwnSeed, []).seed == "own"
    with pytest.raises(SystemExit):
        arguments.parse("convert", OwnSeed, ["--help"])
    text = capsys.readouterr().out
    assert text.count("--seed") == 1
    assert text.index("my seed") < text.index("--load")
