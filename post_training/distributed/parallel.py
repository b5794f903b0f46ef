"""Sizes of the parallel groups. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from post_training.common.errors import UsageError


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

    def __str__(self) -> str:
        return f"TP={self.tensor} PP={self.pipeline}"

    @property
    def model(self) -> int:
        """Processes that hold one replica of the dense part of the model."""
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
