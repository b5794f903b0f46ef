"""The weights of a Hugging Face folder, read into a Megatron model: whole, or part by part.

ModelOpt's importer maps each Hugging Face architecture's tensors to megatron-core's. It records the
names that it reads (importer.py): a source with tensors that were not read is an error instead of a
silently wrong model.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from post_training.checkpoints import huggingface, tied_embeddings
from post_training.checkpoints.source import Source
from post_training.common import safetensors_index
from post_training.common.errors import UsageError
from post_training.config.options import StageOptions
from post_training.models import builder
from post_training.models.families import registry as families

if TYPE_CHECKING:
    from megatron.core.transformer import MegatronModule

    from post_training.checkpoints.dequantize import Exported

logger = logging.getLogger(__name__)

# Old Llama checkpoints carry the rotary frequencies, which every implementation recomputes.
_RECOMPUTED = "rotary_emb.inv_freq"
# Buffers of the Megatron model, which are no parameters.
_BUFFERS = "e_score_correction_bias"
# What the importer raises for a tensor that is missing or has another shape.
_DOES_NOT_FIT = (KeyError, ValueError, RuntimeError, AssertionError)


class HuggingFaceWeights:
    """Streams the weights of a folder into this rank's part of a model. Collective calls.

    Host memory beyond the model itself: the tensors of one linear layer. Each is read (this rank's
    slice), copied and freed before the next.

    Attributes:
        names_read: of the folder's tensors.
    """

    names_read: set[str]

    def __init__(
        self,
        model: MegatronModule,
        source: Source,
        options: StageOptions,
        exported: Exported | None = None,
        show_progress: bool = False,
    ) -> None:
        from post_training.checkpoints import dequantize
        from post_training.checkpoints.importer import Importer
        from post_training.distributed import collectives

        self._source, self._options = source, options
        self._index = exported.index if exported else safetensors_index.read(Path(source.location))

        def unreadable(reason: str) -> UsageError:
            what = f"{source.location}/config.json"
            return UsageError(
                what, f"transformers cannot read it: {reason}", "compare it with the original"
            )

        dtype, trusted = builder.torch_dtype(options.precision), options.trust_remote_code
        # transformers has errors of its own for the values that it refuses.
        with collectives.fail_together((Exception,), unreadable):
            importer = Importer(
                model, source.location, dtype=dtype, trust_remote_code=trusted, dequantize=False
            )
        self._config = huggingface.read_config(Path(source.location))
        importer.reader = self._reader = dequantize.reader(self._config)
        self.names_read = importer.names_read = set()
        importer.index, importer.exported = self._index, exported
        importer.joined, importer.divided = families.rearranged(source.architecture)
        importer.disable_tqdm = not show_progress
        self._importer = importer

    def read(self, part: MegatronModule) -> None:
        """Read the tensors of ``part``: the model, or one of its parts (``models.parts``)."""
        from post_training.distributed import collectives

        self._importer.model = part
        with collectives.fail_together(
            _DOES_NOT_FIT,
            lambda reason: self._does_not_fit(
                f"its tensors do not fit the Megatron model: {reason}"
            ),
        ):
            self._importer._import_state_dict()

    def finish(self, model: MegatronModule) -> None:
        """Check that everything was read, and into as many parameters.

        Raises:
            UsageError: for tensors that were not read, or another number of parameters.
        """
        from post_training.distributed import collectives

        source, reader, index = self._source, self._reader, self._index
        if source.architecture.share_embeddings_and_output_weights:
            collectives.on_first_rank(lambda: tied_embeddings.require(index, source))
        rounded = [name for name, entry in index.items() if entry.dtype == "F16"]
        if rounded and self._options.precision == "bf16":
            logger.warning(
                "%d tensors of the source are F16, which bf16 rounds to 8 bits: --fp16 keeps them",
                len(rounded),
            )
        sizes = {
            name: reader.values_in(name, entry) if reader else entry.numel
            for name, entry in index.items()
            if not (name.endswith(_RECOMPUTED) or families.is_carried(self._config, name))
        }
        if source.architecture.share_embeddings_and_output_weights:
            sizes.pop("lm_head.weight", None)
        read = set().union(*collectives.from_all_ranks(self.names_read))
        if leftover := sorted(sizes.keys() - read):
            raise self._does_not_fit(
                f"{len(leftover)} of its tensors have no place in the Megatron model: "
                f"{', '.join(leftover[:5])}"
            )
        uncounted = (_BUFFERS, reader.scales) if reader else (_BUFFERS,)
        expected = sum(size for name, size in sizes.items() if not name.endswith(uncounted))
        actual = builder.count_parameters(model)
        if actual != expected:
            raise self._does_not_fit(
                f"it has {expected:,} parameters, the Megatron model {actual:,}"
            )
        logger.info("loaded %s: %s parameters, as in the source", source.location, f"{actual:,}")

    def _does_not_fit(self, reason: str) -> UsageError:
        return UsageError(
            f"model {self._source.location}",
            reason,
            "the conf does not describe this model: compare it with config.json",
        )
