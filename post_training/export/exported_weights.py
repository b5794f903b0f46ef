"""An exported folder as a source of weights: what its stored numbers stand for, by plain names."""

from __future__ import annotations

from pathlib import Path

import torch

from post_training.common.errors import UsageError, first_line
from post_training.common.safetensors_index import Entry
from post_training.export.decoders.registry import SCALES
from post_training.export.readback import Folder
from post_training.quantization.engines.base import MIXED, MIXED_COMPRESSED
from post_training.quantization.formats import registry as formats


class ExportedWeights:
    """Decodes one weight at a time, with the code that verifies exports.

    Scales of inputs, keys and values have no part in it: those are in 16 or 32 bits here.

    Attributes:
        index: every weight by its plain name, in its plain shape, and what is stored beside and is
            no scale.
    """

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        stored = folder.index
        self.index: dict[str, Entry] = {}
        used = set()
        for name, shape in folder.expected.items():
            held = folder.stored_name(name)
            if held in stored:
                used.add(held)
                self.index[name] = Entry(stored[held].path, "F32", shape)
        for name in stored.keys() - used:
            if name.rpartition(".")[2] not in SCALES and not folder.is_cache_scale(name):
                self.index[name] = stored[name]

    @property
    def rounds_more(self) -> bool:
        """Whether an engine rounds inputs, keys or values too."""
        said = self._folder.quantization
        layers = (said.get("quantized_layers") or {}).values()
        algorithms = {said.get("quant_algo"), *(each.get("quant_algo") for each in layers)}
        inputs = algorithms - {None, MIXED, MIXED_COMPRESSED} - formats.of_weights_alone()
        return bool(inputs or said.get("kv_cache_quant_algo"))

    def read(self, name: str) -> torch.Tensor:
        """A whole weight in float32; ValueError if it is not stored as the folder says.

        Or if a scale beside it is no scale: an engine would compute with those of inputs too.
        """
        self._require_sound(name.rpartition(".")[0], *SCALES)
        return self._folder.dequantized(name)

    def require_sound_cache(self) -> None:
        """Raise ValueError for a scale of keys or values that is none."""
        for name in filter(self._folder.is_cache_scale, self._folder.index):
            self._require_sound(*name.rpartition(".")[::2])

    def _require_sound(self, module: str, *kinds: str) -> None:
        for name in (f"{module}.{kind}" for kind in kinds):
            if name in self._folder.index and not self._folder.is_sound_scale(name):
                raise ValueError(f"{name} is not finite and positive")


def open_export(path: Path) -> ExportedWeights:
    """The weights of a folder, decoded on this process's device; UsageError if it is no export."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = ExportedWeights(Folder(path, device))
        found.require_sound_cache()
        return found
    except UsageError:
        raise
    # transformers has errors of its own for the values of a configuration that it refuses.
    except Exception as error:
        raise UsageError(
            f"model {path}",
            f"its quantized weights cannot be decoded: {first_line(error)}",
            "name a folder that export.sh wrote, or the checkpoint that it was made from",
        ) from error
