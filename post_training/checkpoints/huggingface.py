"""Hugging Face folders as a source: resolve, describe, and stream the weights into a model.

ModelOpt's importer maps each architecture's tensors to megatron-core's. It is extended here: the
source's index is parsed once, the names that are read are recorded, and a source with tensors that
were not read is an error instead of a silently wrong model.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from post_training.common import files, safetensors_index
from post_training.common.errors import UsageError, first_line

if TYPE_CHECKING:
    import torch
    from megatron.core.transformer import MegatronModule


# Files of a model folder, other than weights, that are needed to use the model.
SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "preprocessor_config.json",
    "LICENSE",
    "NOTICE",
)
_WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json")
# What the importer raises for a tensor that is missing or has another shape.
_DOES_NOT_FIT = (KeyError, ValueError, RuntimeError, AssertionError)


def resolve(name_or_path: str, *, weights: bool, trust_remote_code: bool = False) -> Path:
    """The local folder of a model; rank 0 downloads a hub name. A collective call.

    Args:
        name_or_path: a folder, or a hub name such as ``Qwen/Qwen3-0.6B``.
        weights: whether the weights are needed too.
        trust_remote_code: also fetch the repository's Python files.

    Raises:
        UsageError: if the hub cannot be reached or does not know the name.
    """
    folder = Path(name_or_path)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    from post_training.distributed import collectives

    patterns = [*SMALL_FILES, *(_WEIGHT_PATTERNS if weights else ())]
    if trust_remote_code:
        patterns.append("*.py")

    def cached(offline: bool) -> Path:
        return Path(
            snapshot_download(name_or_path, allow_patterns=patterns, local_files_only=offline)
        )

    def not_provided(reason: str) -> UsageError:
        return UsageError(
            f"model {name_or_path}",
            f"it is no local folder, and the hub did not provide it: {reason}",
            "name a local folder in HF_MODEL_CKPT; for a gated model set HF_TOKEN",
        )

    expected = (HfHubHTTPError, LocalEntryNotFoundError, OSError)

    def download() -> str:
        try:
            return str(cached(offline=False))
        except expected as error:
            raise not_provided(first_line(error)) from error

    path = Path(collectives.on_first_rank(download))
    # Another machine may have a cache of its own.
    with collectives.fail_together(expected, not_provided):
        path = path if path.is_dir() else cached(offline=True)
    return path


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a model folder."""
    return files.read_json_object(folder / "config.json")


def copy_small_files(source: Path, target: Path, *, python_files: bool = False) -> None:
    """Copy configuration, tokenizer and licence files, never weights."""
    for name in SMALL_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    for folder in ("additional_chat_templates",):
        if (source / folder).is_dir():
            shutil.copytree(source / folder, target / folder)
    if python_files:
        for path in source.glob("*.py"):
            shutil.copyfile(path, target / path.name)


@dataclass(frozen=True)
class SmallFiles:
    """What travels with a checkpoint so that it can be exported again: no weights.

    Attributes:
        folder: of the Hugging Face model.
        python_files: whether the model's own code travels too.
        config: takes the place of its ``config.json``: a pruned model's.
    """

    folder: Path
    python_files: bool = False
    config: Mapping[str, Any] | None = None

    def copy_to(self, target: Path) -> None:
        """Write the files into ``target``, which exists."""
        copy_small_files(self.folder, target, python_files=self.python_files)
        if self.config is not None:
            files.write_json(target / "config.json", dict(self.config))


def load_tokenizer(location: Path | str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder or hub name.

    Raises:
        UsageError: if there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(location, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(
            f"tokenizer {location}",
            f"transformers cannot load it: {first_line(error)}",
            "name a folder with tokenizer.json in TOKENIZER_MODEL",
        ) from error


def load_weights(
    model: MegatronModule,
    folder: Path,
    *,
    dtype: torch.dtype,
    tied_embeddings: bool,
    trust_remote_code: bool = False,
    show_progress: bool = False,
) -> int:
    """Stream the weights of ``folder`` into this rank's part of ``model``; a collective call.

    Host memory beyond the model itself: the tensors of one linear layer. Each is read (this rank's
    slice), copied and freed before the next.

    Args:
        dtype: of the model's parameters; the source is cast.
        tied_embeddings: a ``lm_head.weight`` in the source is not read.
        show_progress: draw a progress bar on this rank.

    Returns:
        Parameters in the source, a tied one counted once.

    Raises:
        UsageError: if a tensor is missing, has another shape, or is left over.
    """
    from post_training.distributed import collectives

    def does_not_fit(reason: str) -> UsageError:
        return UsageError(
            f"model {folder}",
            f"its tensors do not fit the Megatron model: {reason}",
            "the conf does not describe this model: compare it with config.json",
        )

    importer = _importer_class()(
        model, str(folder), dtype=dtype, trust_remote_code=trust_remote_code
    )
    importer.disable_tqdm = not show_progress
    with collectives.fail_together(_DOES_NOT_FIT, does_not_fit):
        importer._import_state_dict()
    index = safetensors_index.read(folder)
    leftover = {
        name for name in index if name not in importer.names_read_by_all() and not _ignored(name)
    }
    if tied_embeddings:
        leftover.discard("lm_head.weight")
    if leftover:
        shown = ", ".join(sorted(leftover)[:5])
        raise UsageError(
            f"model {folder}",
            f"{len(leftover)} of its tensors have no place in the Megatron model: {shown}",
            "the conf does not describe this model: compare it with config.json",
        )
    return sum(
        entry.numel
        for name, entry in index.items()
        if not _ignored(name) and not (tied_embeddings and name == "lm_head.weight")
    )


def _ignored(name: str) -> bool:
    # Old Llama checkpoints carry the rotary frequencies, which every implementation recomputes.
    return name.endswith("rotary_emb.inv_freq")


def _importer_class() -> type:
    from modelopt.torch.export.plugins.megatron_importer import GPTModelImporter

    class RecordingImporter(GPTModelImporter):
        """Records the tensors that were read, and parses the source's index once."""

        @cached_property
        def _index(self) -> dict[str, safetensors_index.Entry]:
            return safetensors_index.read(Path(self.pretrained_model_path))

        @cached_property
        def _names_read(self) -> set[str]:
            return set()

        def _get_safetensor(self, key: str, parallel_config: Any = None) -> torch.Tensor:
            if key not in self._index:
                raise KeyError(f"the source has no tensor {key}")
            self._names_read.add(key)
            return super()._get_safetensor(key, parallel_config=parallel_config)

        def names_read_by_all(self) -> set[str]:
            from post_training.distributed import collectives

            return set().union(*collectives.from_all_ranks(self._names_read))

    return RecordingImporter
