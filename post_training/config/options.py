"""What every stage's command line says: which model, where to save, how it is divided and run.

A stage's own options are a subclass whose further fields are flags (``flags.py``). Nothing changes
an instance: what a stage decides it hands on in its plan. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from post_training.distributed.parallel import Parallel


@dataclass(frozen=True, kw_only=True)
class StageOptions:
    """The options that all stages share.

    Attributes:
        stage: name of the stage, e.g. ``convert``.
        given: what the command line (the conf's flags included) really gave, by name; ``run.json``
            records it as the configuration.
        ignored_flags: given flags of Megatron-LM that mean nothing here.
        load: Megatron checkpoint.
        save: where the stage saves its checkpoint.
        overwrite: replace an output that exists.
        pretrained_model_path: Hugging Face folder or hub name.
        tokenizer_model: tokenizer folder or hub name.
        trust_remote_code: run Python code that the model brings.
        seed: of every random number.
        distributed_timeout_minutes: limit of a collective operation.
        log_level: ``debug``, ``info``, ``warning`` or ``error``.
        check_only: ``--check``: exit after the checks.
        dry_run: ``--dry-run``: print what would run and exit; inputs may be missing.
        parallel: sizes of the parallel groups.
        precision: ``fp32``, ``fp16`` or ``bf16``.
        layer_spec: ``modelopt`` or ``transformer_engine``.
        local_attention: attention in plain PyTorch.
        meta_device: build the model without memory first.
        sequence_parallel: split activations over the tensor-parallel ranks too.
        seq_length: length of sequences in tokens, where it is given.
        stated: what the flags state about the model, by the names of ``Architecture.resolved``.
        vocabulary_multiple: an embedding whose size is not stated is padded to a multiple of it.
        overrides: given fields of TransformerConfig that say how the model is run.
    """

    stage: str
    given: Mapping[str, Any]
    ignored_flags: tuple[str, ...] = ()
    load: str | None
    save: str | None
    overwrite: bool
    pretrained_model_path: str | None
    tokenizer_model: str | None
    trust_remote_code: bool
    seed: int
    distributed_timeout_minutes: int
    log_level: str
    check_only: bool
    dry_run: bool
    parallel: Parallel
    precision: str
    layer_spec: str
    local_attention: bool
    meta_device: bool
    sequence_parallel: bool
    seq_length: int | None
    stated: Mapping[str, Any]
    vocabulary_multiple: int
    overrides: Mapping[str, Any]
