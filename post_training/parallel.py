"""Sizes of the parallel groups, and whether a model can be divided that way. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from post_training.architecture import Architecture
from post_training.errors import UsageError


@dataclass(frozen=True)
class Parallel:
    """Sizes of the parallel groups, in processes; ``expert_tensor`` splits each expert.

    ``first_layers`` and ``last_layers`` are the layers of the first and last pipeline stage where
    these differ from the others'.
    """

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    expert_tensor: int = 1
    data: int = 1
    first_layers: int | None = None
    last_layers: int | None = None

    @property
    def model(self) -> int:
        """Processes that hold one copy of the dense part of the model."""
        return self.tensor * self.pipeline * self.context

    @property
    def world(self) -> int:
        """Processes altogether."""
        return self.model * self.data

    @classmethod
    def of_world(
        cls,
        world: int | None,
        *,
        tensor: int = 1,
        pipeline: int = 1,
        context: int = 1,
        expert: int = 1,
        expert_tensor: int | None = None,
        first_layers: int | None = None,
        last_layers: int | None = None,
    ) -> Parallel:
        """The groups of ``world`` processes; None stands for the fewest that the sizes need.

        Raises:
            UsageError: for a size below 1, or sizes that do not fit the number of processes.
        """
        etp = tensor if expert_tensor is None else expert_tensor
        sizes = {"TP": tensor, "PP": pipeline, "CP": context, "EP": expert, "ETP": etp}
        for name, size in sizes.items():
            if size < 1:
                raise UsageError(f"{name}={size}", "a parallel size is at least 1", f"{name}=1")
        dense = tensor * pipeline * context
        if world is None:
            world = pipeline * max(tensor * context, expert * etp)
        if world % dense:
            raise UsageError(
                f"TP={tensor} PP={pipeline} CP={context}",
                f"they take {dense} processes, and the number of those started is {world}",
                f"start a multiple of {dense} processes: the launchers (*.sh) do",
            )
        if (tensor * context * (world // dense)) % (expert * etp):
            raise UsageError(
                f"EP={expert} ETP={etp}",
                f"EP x ETP = {expert * etp} does not divide the {world // pipeline} processes of "
                f"a pipeline stage (TP={tensor} x CP={context} x DP={world // dense})",
                "choose EP x ETP as a divisor of TP x CP x DP; ETP=1 is often right",
            )
        return cls(
            tensor, pipeline, context, expert, etp, world // dense, first_layers, last_layers
        )


def check(architecture: Architecture, parallel: Parallel) -> None:
    """Raise UsageError, naming both numbers, if the model cannot be divided this way."""
    values = architecture.resolved()
    _divides("TP", parallel.tensor, {
        "attention heads": values["num_attention_heads"],
        "query groups": None if values["multi_latent_attention"] else values["num_query_groups"],
        "FFN size": values["ffn_hidden_size"],
        "vocabulary": values["vocab_size"],
        "Mamba heads": values["mamba_num_heads"],
    })  # fmt: skip
    _divides("EP", parallel.expert, {"experts": values["num_moe_experts"]})
    if values["num_moe_experts"]:
        _divides(
            "ETP", parallel.expert_tensor, {"experts' FFN size": values["moe_ffn_hidden_size"]}
        )
    elif parallel.expert > 1:
        raise UsageError(f"EP={parallel.expert}", "the model has no experts", "EP=1")
    layers_per_stage(values["num_layers"], parallel)


def layers_per_stage(layers: int, parallel: Parallel) -> list[int]:
    """Layers of each pipeline stage, first to last.

    Raises:
        UsageError: if they do not come out as at least one whole layer a stage.
    """
    stages, first, last = parallel.pipeline, parallel.first_layers, parallel.last_layers
    if stages == 1:
        if first not in (None, layers) or last not in (None, layers):
            raise UsageError(
                f"--decoder-first-pipeline-num-layers {first} --decoder-last-... {last}",
                f"with PP=1 the only stage has all {layers} layers",
                "leave them out, or set PP",
            )
        return [layers]
    fixed = [n for n in (first, last) if n is not None]
    middle, rest = stages - len(fixed), layers - sum(fixed)
    if middle == 0 and rest == 0 and min(fixed) > 0:
        return fixed
    if middle == 0 or rest % middle or rest // middle < 1 or min(fixed, default=1) < 1:
        detail = f" ({first or 'even'} first, {last or 'even'} last)" if fixed else ""
        raise UsageError(
            f"PP={stages}",
            f"{rest} layers{' of ' + str(layers) if fixed else ''} cannot be spread evenly over "
            f"{middle} pipeline stages{detail}",
            "choose a PP that divides the layers, or set the layers of the first and last stage "
            "with --decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers",
        )
    even = [rest // middle] * middle
    return ([first] if first is not None else []) + even + ([last] if last is not None else [])


def _divides(name: str, size: int, counts: dict[str, int | None]) -> None:
    wrong = [f"{count} {what}" for what, count in counts.items() if count and count % size]
    if wrong:
        good = [n for n in range(1, size) if all(c % n == 0 for c in counts.values() if c)]
        raise UsageError(
            f"{name}={size}",
            f"it does not divide the model's {', '.join(wrong)}",
            f"{name} can be {', '.join(map(str, good))}",
        )
