"""What every stage's command line says: which model, where to save, how it is divided and run.

A stage's own options are a subclass whose further fields are flags (``flags.py``). Nothing changes
an instance: what a stage decides it hands on in its plan. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from post_training.config.flags import flag
from post_training.distributed.parallel import Parallel
from post_training.models.architecture import REQUIRED
from post_training.models.builder import BuildOptions


@dataclass(frozen=True, kw_only=True)
class StageOptions:
    """The options that all stages share: flags, and what ``arguments.py`` makes of others.

    Attributes:
        stage: name of the stage, e.g. ``convert``.
        given: what the command line (the conf's flags included) really gave, by name; ``run.json``
            records it as the configuration.
        ignored_flags: given flags of Megatron-LM that mean nothing here.
        notices: what is said once about the command line, before the work.
        precision: ``fp32``, ``fp16`` or ``bf16``.
        build: how the model is built, but for what a stage and a checkpoint decide.
        sequence_parallel: split activations over the tensor-parallel ranks too.
        seq_length: length of sequences in tokens, where it is given.
        stated: what the flags state about the model, by the names of ``Architecture.resolved``.
        vocabulary_multiple: an embedding whose size is not stated is padded to a multiple of it.
    """

    check: bool = flag(False, help="check everything that needs no weights, and exit")
    dry_run: bool = flag(
        False,
        help="show model, parameters per rank, processes and launch line, and exit; loads nothing, "
        "inputs may be missing",
    )
    load: str | None = flag(metavar="DIR", help="Megatron checkpoint to load")
    save: str | None = flag(metavar="DIR", help="folder for the Megatron checkpoint")
    overwrite: bool = flag(False, help="replace an output that exists")
    no_verify: bool = flag(
        False, help="load inputs without comparing them with the hashes in their run.json"
    )
    pretrained_model_path: str | None = flag(metavar="DIR", help="Hugging Face folder or hub name")
    tokenizer_model: str | None = flag(metavar="DIR", help="tokenizer folder or hub name")
    trust_remote_code: bool = flag(False, help="run Python code that the model brings")
    seed: int = flag(1234, metavar="N", help="default: %(default)s")
    distributed_timeout_minutes: int = flag(
        10, metavar="N", help="limit of a collective operation (default: %(default)s)"
    )
    disable_tqdm: bool = flag(False, help="draw no progress bars")
    log_level: str = flag(
        "info", choices=("debug", "info", "warning", "error"), help="default: %(default)s"
    )

    stage: str
    given: Mapping[str, Any]
    ignored_flags: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()
    parallel: Parallel
    precision: str
    build: BuildOptions
    sequence_parallel: bool
    seq_length: int | None
    stated: Mapping[str, Any]
    vocabulary_multiple: int

    def noting(self, notice: str) -> Self:
        """These options with one more notice."""
        return replace(self, notices=(*self.notices, notice))

    @property
    def asks_server(self) -> bool:
        """Whether a server does what the model would, which is not loaded."""
        return False

    @property
    def states_model(self) -> bool:
        """Whether the flags describe a model, as a conf's do; those of "auto" do not."""
        return all(self.stated.get(name) for name in REQUIRED)
