"""Confs with the flags of Megatron-LM's, as strings, with every stage and ``SANDBOX_ROOT``.

They are written anew from the flags' names and values; what they state about a model is checked
against its published number of parameters.
"""

from __future__ import annotations

import pytest
from confs import ROOT
from launchers import bash, planned

from post_training.cli import dry_run
from post_training.common.errors import UsageError
from post_training.config import model_description
from post_training.models import parameter_count

TRAINING = """--save-interval 100000 --micro-batch-size 1 --bf16 --use-mcore-models
    --tokenizer-type HuggingFaceTokenizer --seq-length 4096"""
ATTENTION = f"""{TRAINING} --no-masked-softmax-fusion --disable-bias-linear --no-rope-fusion
    --normalization RMSNorm --swiglu --group-query-attention --rotary-percent 1.0"""
QWEN = f"{ATTENTION} --position-embedding-type rope --rotary-base 1000000 --no-bias-swiglu-fusion"
QWEN2 = f"{QWEN} --add-qkv-bias --max-position-embeddings 32768 --make-vocab-size-divisible-by 1"
QWEN3 = f"""{QWEN} --qk-layernorm --kv-channels 128 --max-position-embeddings 40960
    --make-vocab-size-divisible-by 1187"""
EXPERTS = """--moe-router-dtype fp32 --moe-aux-loss-coeff 1e-3 --sequence-parallel
    --moe-token-dispatcher-type alltoall"""
QWEN3_MOE = f"""{QWEN3} {EXPERTS} --num-experts 128 --moe-router-topk 8 --num-query-groups 4
    --moe-router-load-balancing-type aux_loss --untie-embeddings-and-output-weights"""
LLAMA3 = f"""{ATTENTION} --use-rotary-position-embeddings --no-position-embedding
    --use-rope-scaling --rotary-base 500000 --max-position-embeddings 8192
    --num-attention-heads 32 --num-query-groups 8 --make-vocab-size-divisible-by 1"""
LLAMA4 = f"""{ATTENTION} {EXPERTS} --position-embedding-type rope --rotary-interleaved
    --rotary-base 500000 --rope-scaling-factor 8.0 --untie-embeddings-and-output-weights
    --num-layers 48 --hidden-size 5120 --ffn-hidden-size 16384 --num-attention-heads 40
    --num-query-groups 8 --moe-ffn-hidden-size 8192 --moe-shared-expert-intermediate-size 8192
    --moe-router-topk 1 --moe-router-topk-scaling-factor 1.0 --moe-router-score-function sigmoid
    --moe-router-load-balancing-type seq_aux_loss --moe-token-drop-policy probs
    --export-moe-apply-probs-on-input --padded-vocab-size 202048"""
LATENT = f"""{TRAINING} {EXPERTS} --no-masked-softmax-fusion --disable-bias-linear --no-rope-fusion
    --normalization RMSNorm --swiglu --position-embedding-type rope --rotary-percent 1.0
    --untie-embeddings-and-output-weights --multi-latent-attention --kv-lora-rank 512
    --v-head-dim 128 --qk-head-dim 128 --qk-layernorm --qk-pos-emb-head-dim 64
    --moe-router-pre-softmax --moe-router-load-balancing-type seq_aux_loss
    --moe-token-drop-policy probs"""
DEEPSEEK3 = f"""{LATENT} --num-layers 61 --hidden-size 7168 --ffn-hidden-size 18432
    --kv-channels 128 --q-lora-rank 1536 --moe-ffn-hidden-size 2048 --moe-router-topk 8
    --moe-router-score-function sigmoid --moe-router-enable-expert-bias
    --moe-router-bias-update-rate 1e-3 --moe-shared-expert-overlap
    --moe-shared-expert-intermediate-size 2048 --mscale 1.0 --mscale-all-dim 1.0
    --recompute-activations --moe-layer-recompute"""
GPT_OSS = f"""{TRAINING} {EXPERTS} --no-masked-softmax-fusion --no-rope-fusion
    --untie-embeddings-and-output-weights --normalization RMSNorm --group-query-attention
    --hidden-size 2880 --ffn-hidden-size 2880 --num-attention-heads 64 --num-query-groups 8
    --kv-channels 64 --moe-ffn-hidden-size 2880 --moe-router-topk 4 --rotary-base 150000
    --moe-router-score-function softmax --moe-router-load-balancing-type aux_loss
    --max-position-embeddings 40960 --make-vocab-size-divisible-by 128 --padded-vocab-size 201088
    --no-bias-gelu-fusion --no-bias-dropout-fusion --export-force-local-attention --quick-geglu
    --glu-linear-offset 1.0 --softmax-type learnable --window-attn-skip-freq 2 --window-size 127,0
    --activation-func-clamp-value 7.0 --enable-gpt-oss"""
# Name -> flags, parameters as published (those of the text model). Those of Llama 4, gpt-oss and
# Nemotron-Mini were not looked up: they only say that the count does not change.
DENSE_AND_EXPERTS = {
    "Qwen/Qwen2.5-0.5B-Instruct": (
        f"{QWEN2} --num-layers 24 --hidden-size 896 --ffn-hidden-size 4864 --kv-channels 64 "
        "--num-attention-heads 14 --num-query-groups 2 --padded-vocab-size 151936",
        494_032_768,
    ),
    "Qwen/Qwen2.5-7B-Instruct": (
        f"{QWEN2} --num-layers 28 --hidden-size 3584 --ffn-hidden-size 18944 --kv-channels 128 "
        "--num-attention-heads 28 --num-query-groups 4 --padded-vocab-size 152064 "
        "--untie-embeddings-and-output-weights",
        7_615_616_512,
    ),
    "Qwen/Qwen3-0.6B": (
        f"{QWEN3} --num-layers 28 --hidden-size 1024 --ffn-hidden-size 3072 "
        "--num-attention-heads 16 --num-query-groups 8",
        596_049_920,
    ),
    "Qwen/Qwen3-8B": (
        f"{QWEN3} --num-layers 36 --hidden-size 4096 --ffn-hidden-size 12288 "
        "--num-attention-heads 32 --num-query-groups 8 --untie-embeddings-and-output-weights",
        8_190_735_360,
    ),
    "Qwen/Qwen3-30B-A3B": (
        f"{QWEN3_MOE} --num-layers 48 --hidden-size 2048 --ffn-hidden-size 6144 "
        "--num-attention-heads 32 --moe-ffn-hidden-size 768",
        30_532_122_624,
    ),
    "Qwen/Qwen3-235B-A22B": (
        f"{QWEN3_MOE} --num-layers 94 --hidden-size 4096 --ffn-hidden-size 12288 "
        "--num-attention-heads 64 --moe-ffn-hidden-size 1536 --moe-layer-recompute "
        "--rotary-seq-len-interpolation-factor 1 --attention-dropout 0.0 --hidden-dropout 0.0",
        235_093_634_560,
    ),
    "meta-llama/Llama-3.1-8B-Instruct": (
        f"{LLAMA3} --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 "
        "--untie-embeddings-and-output-weights",
        8_030_261_248,
    ),
    "meta-llama/Llama-3.2-1B-Instruct": (
        f"{LLAMA3} --num-layers 16 --hidden-size 2048 --ffn-hidden-size 8192",
        1_235_814_400,
    ),
    "meta-llama/Llama-4-Scout-17B-16E-Instruct": (
        f"{LLAMA4} --num-experts 16 --qk-layernorm --export-qk-l2-norm --use-rope-scaling "
        "--max-position-embeddings 4096 --no-bias-swiglu-fusion",
        107_769_861_120,
    ),
    "meta-llama/Llama-4-Maverick-17B-128E-Instruct": (
        f"{LLAMA4} --num-experts 128 --moe-layer-freq ([0,1]*24) --no-rope-freq 4 "
        "--max-position-embeddings 2048 --recompute-activations --moe-layer-recompute",
        400_711_848_960,
    ),
    "deepseek-ai/DeepSeek-V2-Lite": (
        f"{LATENT} --num-layers 27 --hidden-size 2048 --ffn-hidden-size 10944 "
        "--num-attention-heads 16 --kv-channels 16 --norm-epsilon 1e-6 --num-experts 64 "
        "--moe-layer-freq ([0]+[1]*26) --moe-ffn-hidden-size 1408 --moe-grouped-gemm "
        "--moe-router-topk 6 --moe-router-topk-scaling-factor 1.0 --rotary-base 10000 "
        "--moe-router-score-function softmax --moe-shared-expert-intermediate-size 2816 "
        "--seq-length 1024 --max-position-embeddings 1024 --make-vocab-size-divisible-by 3200 "
        "--attention-softmax-in-fp32 --rotary-scaling-factor 40 --mscale 0.707 "
        "--mscale-all-dim 0.707",
        15_706_484_224,
    ),
    "deepseek-ai/DeepSeek-R1": (
        f"{DEEPSEEK3} --num-attention-heads 128 --num-experts 256 --moe-layer-freq [0]*3+[1]*58 "
        "--moe-router-num-groups 8 --moe-router-group-topk 4 --rotary-base 10000 "
        "--moe-router-topk-scaling-factor 2.5 --rotary-scaling-factor 40 "
        "--make-vocab-size-divisible-by 1280 --max-position-embeddings 163840",
        671_026_419_200 - 58 * 256,  # without the router's biases, which are no parameters here
    ),
    "moonshotai/Kimi-K2-Instruct": (
        f"{DEEPSEEK3} --num-attention-heads 64 --num-experts 384 --moe-layer-freq [0]*1+[1]*60 "
        "--moe-router-topk-scaling-factor 2.827 --rotary-base 50000 --rotary-scaling-factor 32 "
        "--make-vocab-size-divisible-by 1 --padded-vocab-size 163840 --trust-remote-code "
        "--max-position-embeddings 131072",
        1_026_408_232_448 - 60 * 384,
    ),
    "nvidia/Nemotron-Mini-4B-Instruct": (
        f"{TRAINING} --no-masked-softmax-fusion --disable-bias-linear --no-position-embedding "
        "--use-rotary-position-embeddings --rotary-percent 0.5 --rotary-base 10000 "
        "--normalization LayerNorm --apply-layernorm-1p --squared-relu --num-layers 32 "
        "--hidden-size 3072 --ffn-hidden-size 9216 --num-attention-heads 24 "
        "--group-query-attention --num-query-groups 8 --max-position-embeddings 4096 "
        "--untie-embeddings-and-output-weights --make-vocab-size-divisible-by 1",
        4_190_509_056,
    ),
    "openai/gpt-oss-20b": (f"{GPT_OSS} --num-layers 24 --num-experts 32", 20_914_757_184),
    "openai/gpt-oss-120b": (f"{GPT_OSS} --num-layers 36 --num-experts 128", 116_829_156_672),
}
HYBRID = f"""{TRAINING} --trust-remote-code --disable-bias-linear --normalization RMSNorm
    --untie-embeddings-and-output-weights --squared-relu --group-query-attention
    --export-model-type HybridModel"""
NEMOTRON3 = f"""{HYBRID} {EXPERTS} --enable-experimental --use-fused-weighted-squared-relu
    --cross-entropy-loss-fusion --cross-entropy-fusion-impl native --moe-permute-fusion
    --moe-grouped-gemm --moe-router-score-function sigmoid --moe-router-enable-expert-bias
    --attention-backend flash --disable-gloo-process-groups --init-method-std 0.0173
    --position-embedding-type none --kv-channels 128 --num-query-groups 2 --mamba-head-dim 64"""
# Name -> flags, layers; the tokenizers of all have 131,072 tokens.
HYBRIDS = {
    "nvidia/Nemotron-H-4B-Instruct": (
        f"{HYBRID} --use-rotary-position-embeddings --rotary-percent 0.5 --rotary-base 10000 "
        "--no-position-embedding --hidden-size 3072 --ffn-hidden-size 12288 --kv-channels 128 "
        "--num-attention-heads 32 --num-query-groups 8 --hybrid-layer-pattern M-M-M*-M- "
        "--mamba-head-dim 64 --mamba-num-heads 112 --mamba-num-groups 8 --mamba-state-dim 128 "
        "--make-vocab-size-divisible-by 1",
        9,
    ),
    "nvidia/Nemotron-H-56B-Base-8K": (
        f"{HYBRID} --position-embedding-type none --hidden-size 8192 --ffn-hidden-size 32768 "
        "--num-attention-heads 64 --num-query-groups 8 --kv-channels 128 --mamba-state-dim 256 "
        "--hybrid-layer-pattern M-M*-M- --tiktoken-pattern v2 --exit-duration-in-mins 230 "
        "--attention-backend flash --tensor-model-parallel-size 8 "
        "--pipeline-model-parallel-size 1",
        7,
    ),
    "nvidia/NVIDIA-Nemotron-Nano-9B-v2": (
        f"{HYBRID} --position-embedding-type none --hidden-size 4480 --ffn-hidden-size 15680 "
        "--num-attention-heads 40 --num-query-groups 8 --kv-channels 128 --mamba-head-dim 80 "
        "--mamba-num-heads 128 --mamba-num-groups 8 --mamba-state-dim 128 "
        "--hybrid-layer-pattern M-M-M-MM-M* --padded-vocab-size 131072",
        11,
    ),
    "nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-BF16": (
        f"{NEMOTRON3} --is-hybrid-model --num-experts 512 --moe-router-topk 22 --hidden-size 4096 "
        "--num-attention-heads 32 --ffn-hidden-size 2688 --mamba-num-heads 128 "
        "--moe-latent-size 1024 --moe-router-topk-scaling-factor 5.0 "
        "--moe-shared-expert-intermediate-size 5376 --hybrid-layer-pattern MEMEM*EM",
        8,
    ),
    "nvidia/NVIDIA-Nemotron-3-Ultra-550B-A55B-BF16": (
        f"{NEMOTRON3} --is-hybrid-model --num-experts 512 --moe-router-topk 22 --hidden-size 8192 "
        "--num-attention-heads 64 --ffn-hidden-size 5120 --mamba-num-heads 256 "
        "--moe-latent-size 2048 --moe-router-topk-scaling-factor 5.0 --num-layers 6 "
        "--moe-shared-expert-intermediate-size 10240 --hybrid-override-pattern MEM*EM",
        6,
    ),
}
CONFS = {**DENSE_AND_EXPERTS, **HYBRIDS}
NEEDS = {
    "prune": {"MLM_EXTRA_ARGS": '--prune-export-config {"num_layers":4}'},
    "distill": {"MLM_MODEL_CKPT": "/nowhere/student", "TEACHER_CKPT": "/nowhere/teacher"},
    "extract_features": {"MLM_EXTRA_ARGS": "--output-dir features"},
    "export": {"MLM_MODEL_CKPT": "/nowhere/made"},
}
EVERY_STAGE = ("Qwen/Qwen3-8B", "deepseek-ai/DeepSeek-V2-Lite", "nvidia/Nemotron-H-4B-Instruct")
STAGES = (
    *(
        "convert",
        "quantize",
        "prune",
        "distill",
        "finetune",
        "generate",
        "eagle3",
        "extract_features",
    ),
    *("mmlu", "validate", "export"),
)
TEXT = """#!/bin/bash
if [ -z ${HF_MODEL_CKPT} ]; then
    HF_MODEL_CKPT=NAME
    TOKENIZER_MODEL=NAME
else
    TOKENIZER_MODEL=${HF_MODEL_CKPT}
fi
MODEL_ARGS=" FLAGS "
"""


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory):
    """A folder for SANDBOX_ROOT with every conf."""
    root = tmp_path_factory.mktemp("sandbox")
    for name, (flags, _) in CONFS.items():
        path = root / "conf" / "model" / f"{name}.sh"
        path.parent.mkdir(parents=True, exist_ok=True)
        # One flag a line, each line continued, as a person writes them.
        lines = " \\\n    --".join(flags.split(" --"))
        path.write_text(TEXT.replace("NAME", name).replace("FLAGS", lines))
    return {"SANDBOX_ROOT": str(root)}


@pytest.mark.parametrize("conf", DENSE_AND_EXPERTS)
def test_the_plan_has_the_published_number_of_parameters(conf, environment, sandbox, capsys):
    plan = planned("convert.sh", conf, **environment, **sandbox)
    dry_run.show(plan.options, plan.source)
    shown = capsys.readouterr().out
    assert f"{DENSE_AND_EXPERTS[conf][1]:,} (bf16)" in shown
    assert ("are assumed, padded to" in shown) == ("--padded-vocab-size" not in CONFS[conf][0])


@pytest.mark.parametrize("conf", HYBRIDS)
def test_a_hybrid_is_described_by_its_flags(conf, environment, sandbox, capsys):
    plan = planned("convert.sh", conf, **environment, **sandbox)
    described = model_description.architecture(plan.options)
    assert described.value("num_layers") == HYBRIDS[conf][1]
    assert described.vocab_size == 131_072
    assert described.model_type == "HybridModel"
    dry_run.show(plan.options, plan.source)
    shown = capsys.readouterr().out
    assert "launch line" in shown
    assert f"{parameter_count.total(described):,} (bf16)" in shown


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("conf", EVERY_STAGE)
def test_every_stage_plans_a_conf_as_a_string(stage, conf, environment, sandbox):
    plan = planned(f"{stage}.sh", conf, **environment, **sandbox, **NEEDS.get(stage, {}))
    described = plan.source.described or model_description.architecture(plan.options)
    assert described.vocab_size == {"Q": 151_936, "d": 102_400, "n": 131_072}[conf[0]]


def test_gpt_oss_flag_is_its_positions(environment, sandbox):
    options = planned("convert.sh", "openai/gpt-oss-20b", **environment, **sandbox).options
    assert model_description.architecture(options).position_embedding_type == "yarn"


def test_positions_that_are_scaled_linearly_are_refused(environment, sandbox):
    words = ("Qwen/Qwen3-8B", "--rotary-seq-len-interpolation-factor", "4")
    with pytest.raises(UsageError, match="not scaled linearly"):
        planned("convert.sh", *words, **environment, **sandbox)


def test_a_tokenizers_size_is_read_where_it_is_there(environment, sandbox, tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": {"a": 4000}}}')
    environment["TOKENIZER_MODEL"] = str(tmp_path)
    plan = planned("convert.sh", "Qwen/Qwen3-8B", **environment, **sandbox)
    assert model_description.architecture(plan.options).vocab_size == 4 * 1187
    assert model_description.assumption(plan.options) is None
    environment["TOKENIZER_MODEL"] = "org/unknown"
    plan = planned("convert.sh", "Qwen/Qwen3-8B", **environment, **sandbox)
    with pytest.raises(UsageError, match="TOKENIZER_MODEL"):
        dry_run.show(plan.options, plan.source)


def test_a_set_up_file_names_a_folder_of_another_machine(environment, sandbox):
    """As those for Kimi-K2: one to train a draft, one to export at PP=16."""
    conf = "moonshotai/Kimi-K2-Instruct"
    folder = "/workspace/scratch/moonshotai/Kimi-K2-Instruct"
    environment["SANDBOX_ENV_SETUP"] = str(ROOT / "slurm" / "examples" / "kimi_k2_eagle3.sh")
    plan = planned("eagle3.sh", conf, **environment, **sandbox)
    assert (plan.source.location, plan.options.parallel.world) == (folder, 64)
    environment["SANDBOX_ENV_SETUP"] = str(ROOT / "slurm" / "examples" / "kimi_k2_export.sh")
    plan = planned("export.sh", conf, **environment, **sandbox, MLM_MODEL_CKPT="/nowhere/made")
    stages = parameter_count.per_stage(plan.source.described, plan.options.parallel)
    assert [layers for layers, _ in stages] == [3, *[4] * 14, 2]


def test_without_a_dry_run_a_missing_folder_is_refused(environment, sandbox):
    environment["HF_MODEL_CKPT"] = "/workspace/scratch/Qwen3-8B"
    done = bash("convert.sh", "Qwen/Qwen3-8B", **environment, **sandbox, code=2)
    assert "there is no such folder" in done.stderr
