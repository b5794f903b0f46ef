"""Megatron-LM's spellings: flags whose name or form differs from the configuration's fields.

Three tables, and nothing else. ``CONSTANTS``: a flag without a value that sets fields. ``ALIASES``:
a flag with a value under another name. ``WITHOUT_MEANING``: flags of Megatron-LM's training loop
that its confs carry; here they are accepted, and reported in one debug line.
"""

from __future__ import annotations

from typing import Any

CONSTANTS: dict[str, dict[str, Any]] = {
    "--swiglu": {"gated_linear_unit": True, "activation_func": "silu"},
    "--quick-geglu": {"gated_linear_unit": True, "activation_func": "quick_gelu"},
    "--squared-relu": {"activation_func": "squared_relu"},
    "--use-rotary-position-embeddings": {"position_embedding_type": "rope"},
    "--no-rope-fusion": {"apply_rope_fusion": False},
    "--no-bias-gelu-fusion": {"bias_activation_fusion": False},
    "--no-bias-swiglu-fusion": {"bias_activation_fusion": False},
    "--recompute-activations": {"recompute_granularity": "selective"},
    "--enable-gpt-oss": {
        "position_embedding_type": "yarn",
        "yarn": {
            "rotary_scaling_factor": 32.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "correction_range_round_to_int": False,
        },
    },
    "--export-qk-l2-norm": {"qk_l2_norm": True},
    "--export-moe-apply-probs-on-input": {"moe_apply_probs_on_input": True},
}

ALIASES: dict[str, str] = {
    "--num-experts": "num_moe_experts",
    "--decoder-first-pipeline-num-layers": "num_layers_in_first_pipeline_stage",
    "--decoder-last-pipeline-num-layers": "num_layers_in_last_pipeline_stage",
    "--recompute-num-layers-per-stage": "recompute_num_layers",
}

# Name -> number of values: 0, 1 or "+" (one or more).
WITHOUT_MEANING: dict[str, int | str] = {
    **dict.fromkeys(
        """
        --async-save --auto-detect-ckpt-format --deprecated-use-mcore-models
        --disable-gloo-process-groups --dist-ckpt-save-pre-mcore-014
        --enable-experimental --eod-mask-loss --exit-on-missing-checkpoint --finetune
        --inference-ckpt-non-strict --manual-gc --mock-data
        --no-async-tensor-model-parallel-allreduce
        --no-check-for-nan-in-loss-and-grad --no-create-attention-mask-in-dataloader
        --no-load-optim --no-load-rng --no-position-embedding --no-save-optim --no-save-rng
        --no-use-tokenizer-model-from-checkpoint-args --overlap-grad-reduce
        --overlap-param-gather --override-opt_param-scheduler --reset-attention-mask
        --reset-position-ids --sft --skip-train --use-checkpoint-args --use-dist-ckpt
        --use-distributed-optimizer --use-flash-attn --use-legacy-models --use-mcore-models
        --use-mp-args-from-checkpoint-args
        """.split(),
        0,
    ),
    **dict.fromkeys(
        """
        --adam-beta1 --adam-beta2 --adam-eps --ckpt-format --clip-grad --data-args-path
        --data-cache-path --dataloader-type --dist-ckpt-format --dist-ckpt-strictness
        --distributed-backend --eval-interval --eval-iters --exit-duration-in-mins --exit-interval
        --global-batch-size --inference-batch-times-seqlen-threshold --inference-max-seq-length
        --log-interval --logging-level --lr --lr-decay-iters --lr-decay-samples --lr-decay-style
        --lr-warmup-fraction --lr-warmup-iters --lr-warmup-samples --manual-gc-interval
        --micro-batch-size --min-lr --num-workers --optimizer --per-split-data-args-path
        --save-interval --split --tensorboard-dir --tiktoken-pattern
        --tokenizer-hf-include-special-tokens --train-iters --train-samples --transformer-impl
        --wandb-exp-name --wandb-project --weight-decay
        """.split(),
        1,
    ),
    **dict.fromkeys(
        "--data-path --test-data-path --train-data-path --valid-data-path".split(), "+"
    ),
}
