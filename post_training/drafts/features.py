"""Stored features of a target: what a draft is trained from without running the target.

A folder of ``extract_features.sh``::

    run.json                    of which model, in which layout, how much
    train/ valid/ test/         of 98 %, 1 % and 1 % of the conversations
      shard-00000.safetensors   input_ids int32 [n, s], loss_mask uint8 [n, s],
                                hidden_states [n, s, h], aux_hidden_states [n, s, 3 h]

``hidden_states`` are those after the target's last norm, in the target's precision, so that losses
are those of online training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from post_training.checkpoints.source import Source
from post_training.common import files, forms, manifest, outputs, ownership
from post_training.common.errors import UsageError
from post_training.data import conversation_data
from post_training.drafts import registry
from post_training.drafts.eagle3.draft import Draft
from post_training.drafts.shards import AGAIN, Features, Form
from post_training.models.architecture import Architecture

OPTION = "--offline-distillation-data"
_LAYERS = "aux_hidden_state_layer_ids"
SETTINGS = "settings.json"  # what must not change between the runs of an extraction


def identity(source: Source, draft: Draft, dtype: str) -> dict[str, Any]:
    """What decides the features of a model, as far as it is known without its weights."""
    quantization = (source.manifest or {}).get("quantization") or {}
    return {
        "architecture": source.architecture.to_json(),
        _LAYERS: draft.aux_hidden_state_layer_ids,
        "quantization": quantization.get("format"),
        "dtype": dtype,
    }


def check_folder(
    folder: Path, settings: Mapping[str, Any] | None, *, overwrite: bool = False
) -> None:
    """Raise UsageError unless a folder is empty or holds an unfinished extraction like this one.

    ``settings`` are None where they are not known yet. With ``overwrite`` any features may lie
    there.
    """
    what = f"--output-dir {folder}"
    outputs.writable(folder / SETTINGS, what)
    if not folder.is_dir():
        return
    if overwrite:
        found = files.read_json(folder / SETTINGS)  # other programs have files of this name
        begun = isinstance(found, dict) and _LAYERS in found
        ownership.require_own(folder, ["extract_features"], begun=begun)
        return
    content = manifest.read(folder)
    if content is not None:
        raise UsageError(
            what,
            f"it holds the output of {content.get('stage')}, finished {content.get('finished')}",
            "name another folder, or give --overwrite",
        )
    before = None
    if (folder / SETTINGS).is_file():
        before = files.read_json_object(folder / SETTINGS, "settings", "give --overwrite")
    elif any(folder.iterdir()):
        raise UsageError(what, "it is not empty and no extraction", "name another folder")
    if before is not None and settings is not None:
        changed = [name for name in settings if settings[name] != before.get(name)]
        if changed:
            raise UsageError(
                what,
                f"an extraction with another {', '.join(changed)} was started there",
                "use the same settings, name another folder, or give --overwrite",
            )


class _Shard(TypedDict):
    file: str
    sequences: int


class _Form(TypedDict):
    architecture: dict[str, Any]
    aux_hidden_state_layer_ids: list[int]
    fingerprint: str
    sequence_length: int
    shards: list[_Shard]


@dataclass(frozen=True)
class Stored:
    """A finished folder of features: the entry ``features`` of its ``run.json``, and its files."""

    folder: Path
    recorded: Mapping[str, Any]
    outputs: Sequence[Mapping[str, Any]]

    @property
    def sequence_length(self) -> int:
        return int(self.recorded["sequence_length"])

    def parts(self) -> dict[str, Features]:
        """The sequences by the name of their part."""
        outputs = {self.folder / each["file"]: each for each in self.outputs}
        architecture = Architecture.from_json(self.recorded["architecture"])
        size, layers = architecture.value("hidden_size"), self.recorded[_LAYERS]
        form = Form(self.sequence_length, size, size * len(layers), architecture.vocab_size)
        parts = {name: Features([], outputs, form) for name in conversation_data.PARTS}
        for entry in self.recorded["shards"]:
            path = self.folder / entry["file"]
            parts[path.parent.name].shards.append((path, entry["sequences"]))
        return parts

    def prompts(self) -> list[list[int]]:
        """Token ids of held-out prompts."""
        path = self.folder / conversation_data.PROMPTS
        if not path.is_file():
            return []
        what = f"prompts {path}"
        found: list[list[int]] = forms.parse(files.read_json(path), list[list[int]], what, AGAIN)
        return found


def find(folder: Path, seq_length: int | None = None) -> Stored:
    """The features that ``--offline-distillation-data`` names.

    Raises:
        UsageError: if there are none, or not all, or of another ``--seq-length``.
    """
    option = f"{OPTION} {folder}"
    if not folder.is_dir():
        raise UsageError(option, "there is no such folder", "make it with extract_features.sh")
    content = manifest.read(folder)
    if content is None or content.get("stage") != "extract_features":
        unfinished = any(folder.glob("*/shard-*"))
        raise UsageError(
            option,
            "its extraction is not finished" if unfinished else "it holds no features",
            "run extract_features.sh; it resumes where it was interrupted",
        )
    damaged = manifest.damaged_outputs(folder, content)
    if damaged:
        raise UsageError(
            option,
            f"{len(damaged)} of its files are missing or cut short, e.g. {damaged[0]}",
            AGAIN,
        )
    recorded, outputs = content.get("features") or {}, content.get("outputs", [])
    forms.parse(recorded, _Form, f"{option}: features in {manifest.FILE}", AGAIN)
    files_there = {each["file"] for each in outputs}
    for shard in recorded["shards"]:
        name = shard["file"]
        if name not in files_there or Path(name).parent.name not in conversation_data.PARTS:
            raise UsageError(f"{option}: {name}", "it is none of the extraction's outputs", AGAIN)
    stored = Stored(folder, recorded, outputs)
    if seq_length not in (None, stored.sequence_length):
        raise UsageError(
            f"--seq-length {seq_length}",
            f"the sequences in {folder} have {stored.sequence_length} tokens",
            f"--seq-length {stored.sequence_length}",
        )
    return stored


def check_model(stored: Stored, source: Source, draft: Draft, dtype: str) -> None:
    """Raise UsageError unless the features are of this model, in this precision."""
    then, now = stored.recorded, identity(source, draft, dtype)
    theirs = Architecture.from_json(then["architecture"])
    values = [(d.name, d.theirs, d.mine) for d in source.architecture.differences(theirs)]
    values += [(name, then.get(name), now[name]) for name in now if name != "architecture"]
    wrong = [f"{name} is {a!r} there and {b!r} here" for name, a, b in values if a != b]
    if wrong:
        raise UsageError(
            f"{OPTION} {stored.folder}",
            f"its features are of another model: {'; '.join(wrong[:4])}",
            "extract them from this model (extract_features.sh)",
        )


def fingerprint(core: Any) -> str | None:
    """Hash of a part of the target's weights, the same at every layout; on the last stage only.

    Embeddings of 64 tokens and the final norm: two trainings of one architecture differ in them.
    """
    import torch

    from post_training.inference import forward

    if not core.post_process:
        return None
    device = next(core.parameters()).device
    ids = torch.linspace(0, core.vocab_size - 1, 64, device=device).long()[None]
    with torch.no_grad(), forward.whole_sequences(core):
        rows = core.embedding(input_ids=ids, position_ids=torch.zeros_like(ids))
        norm = core.decoder.final_layernorm.weight
    digest = hashlib.sha256()
    for tensor in (rows, norm):
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def require_same_model(core: Any, stored: Stored, draft: Draft, dtype: str) -> None:
    """Raise UsageError unless the loaded target is the one that the features are of.

    The hash of ``core``, this rank's part, is compared and, where it has its layers and one stage,
    the states that it gives for the first stored sequence; a collective call.
    """
    import torch

    option = f"{OPTION} {stored.folder}"
    remedy = "extract features from this checkpoint (extract_features.sh)"
    found = fingerprint(core)
    if found is not None and found != stored.recorded["fingerprint"]:
        raise UsageError(option, "its features are of other weights than these", remedy)
    if not (core.pre_process and core.post_process and len(core.decoder.layers)):
        return
    batch = stored.parts()["train"].batch([0])
    kept = batch["hidden_states"].transpose(0, 1).to(next(core.parameters()).device)
    states = registry.find(draft.algorithm).features(core, batch["input_ids"].to(kept.device))
    if states is None:
        return
    difference = float((states[0] - kept).float().norm() / kept.float().norm())
    # Devices round differently; NaN is never below.
    if not difference <= (1e-3 if dtype == "fp32" else 5e-2):
        raise UsageError(
            option, f"this target's states differ from the stored ones by {difference:.1%}", remedy
        )
    torch.distributed.barrier()
