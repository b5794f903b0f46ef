"""An exported folder while it is written: files of a limited size, joined and found equal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from post_training.common import files, hashing, safetensors_index
from post_training.common.errors import UsageError
from post_training.distributed.collectives import from_all_ranks, on_first_rank
from post_training.export import staging

Tensors = dict[str, torch.Tensor]


def write_tensors(folder: Path, groups: Iterable[Tensors], max_bytes: int) -> None:
    """Write every rank's tensors as safetensors files with one index; a collective call.

    Args:
        groups: this rank's; host memory holds those of one file.
        max_bytes: of a file.

    Raises:
        UsageError: if two ranks wrote a tensor of the same name.
    """
    rank = torch.distributed.get_rank()
    mine: list[str] = []
    for tensors in shards(groups, max_bytes):
        mine.append(f"rank{rank:05d}-{len(mine):05d}.safetensors")
        save_file(tensors, folder / mine[-1], metadata={"format": "pt"})
        hashing.describe_ahead(folder / mine[-1])
    written = [name for each in from_all_ranks(mine) for name in each]
    on_first_rank(lambda: join(folder, written))


def shards(groups: Iterable[Tensors], max_bytes: int) -> Iterator[Tensors]:
    """The tensors in host memory, as many at a time as a file holds."""
    pending: Tensors = {}
    size = 0
    for group in groups:
        for name, tensor in group.items():
            if pending and size + tensor.nbytes > max_bytes:
                yield pending
                pending.clear()
                size = 0
            # safetensors refuses views that share memory; scales are shared between q, k and v.
            pending[name] = staging.to_host(tensor)
            size += tensor.nbytes
    if pending:
        yield pending


def join(folder: Path, written: list[str]) -> None:
    """Give all ranks' files their final names, and write the index."""
    weight_map: dict[str, str] = {}
    total = 0
    for number, name in enumerate(written, start=1):
        final = final_name(number, len(written))
        (folder / name).rename(folder / final)
        for tensor, entry in safetensors_index.read_file(folder / final).items():
            if tensor in weight_map:
                raise UsageError(
                    f"export {folder}",
                    f"two ranks wrote {tensor}",
                    "export at TP=1 and DP=1, which export.sh chooses",
                )
            weight_map[tensor] = final
            total += entry.bytes
    if len(written) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        files.write_json(folder / safetensors_index.INDEX, index)


def final_name(number: int, count: int) -> str:
    """Of a file of weights, of ``count``, from 1."""
    if count == 1:
        return safetensors_index.SINGLE
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def require_equal(problems: list[str], folder: Path) -> None:
    """Fail on every rank if one of them found a problem; a collective call.

    Raises:
        UsageError: naming the first problems.
    """
    found = [problem for each in from_all_ranks(problems) for problem in each]
    if found:
        raise UsageError(
            f"export {folder}",
            f"{len(found)} differences from the model: " + "; ".join(found[:5]),
            "this is a fault of the exporter, and the folder was not given its final name: report "
            "it with the command and run.json of the checkpoint",
        )
