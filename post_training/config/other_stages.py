"""Flags of Megatron-LM's scripts that a stage without a use for them accepts, and calls unused.

Megatron-LM gives most of its post-training flags to every script, so ``MLM_EXTRA_ARGS`` may be the
same for a whole workflow. Here a stage declares the flags that it reads; those of the other stages
are in ``UNUSED``, and one line at the start names those that were given.
"""

from __future__ import annotations

# Why a flag is unused in every stage.
_FROM_CHECKPOINT = "a checkpoint says itself what ModelOpt did"
_NOWHERE = "Megatron-LM reads it nowhere either"
_NO_MTP = "only distill trains the target's weights"


def _of(stages: str, count: int | str, flags: str) -> dict[str, tuple[int | str, str]]:
    return dict.fromkeys(flags.split(), (count, f"a flag of {stages}"))


# Flag -> number of values (as in megatron_spellings.WITHOUT_MEANING; ? is one or none), and whose
# it is or why nothing reads it.
UNUSED: dict[str, tuple[int | str, str]] = {
    **_of("convert", 1, "--algorithm --extra-model-path"),
    **_of("convert and eagle3", 1, "--eagle-config"),
    **_of("convert and eagle3", "?", "--mix-hidden-states"),
    **_of("convert, eagle3 and export", 0, "--export-offline-model"),
    **_of(
        "quantize",
        1,
        """--auto-quantize-bits --auto-quantize-checkpoint --auto-quantize-method
        --auto-quantize-score-size --export-kv-cache-quant --export-quant-cfg
        --export-real-quant-cfg --recipe""",
    ),
    **_of("quantize", "+", "--auto-quantize-formats"),
    **_of("quantize", 0, "--compress --disable-qkv-quant --sync-expert-weight-amax --weight-only"),
    **_of(
        "quantize and prune",
        1,
        """--calib-batch-size --calib-dataset --calib-dataset-path-or-name
        --calib-max-sequence-length --calib-size --generate-output-len --prompts --references""",
    ),
    **_of("quantize and prune", 0, "--calib-use-random-offset --skip-generate"),
    **_of("prune", 1, "--prune-export-config --prune-intermediate-ckpt"),
    **_of("eagle3", 1, "--offline-distillation-data"),
    **_of("the stages with data", 1, "--finetune-data-split --finetune-hf-dataset"),
    **_of("the stages with data", "+", "--finetune-data-files"),
    **_of("extract_features", 1, "--num-samples --output-dir"),
    **_of("mmlu", 1, "--few-shots --lower-bound --mmlu-batch-size --mmlu-dataset"),
    **_of("mmlu and generate", 1, "--fraction"),
    **_of("validate and generate", 1, "--osl --prompts-path"),
    **_of("validate", 1, "--ground-truth-path --save-ground-truth-path --steps"),
    **_of("generate", 1, "--draft-length --draft-topk"),
    **_of("export", 1, "--export-dir --pretrained-model-name"),
    **_of("export", 0, "--export-extra-modules --export-vllm-fq"),
    **_of(
        "distill",
        1,
        """--export-kd-cfg --export-kd-distill-cfg --export-kd-teacher-ckpt-format
        --export-kd-teacher-load --export-kd-teacher-model-config""",
    ),
    "--qad-train-target": (1, _NO_MTP),
    "--freeze-base-for-mtp": (0, _NO_MTP),
    "--modelopt-enabled": (0, _FROM_CHECKPOINT),
    "--export-legacy-megatron": (0, _NOWHERE),
}


def notice(flags: list[str]) -> str:
    """One line about the given flags of ``UNUSED``."""
    return "unused here: " + ", ".join(f"{flag} ({UNUSED[flag][1]})" for flag in flags)
