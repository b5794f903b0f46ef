"""A layer's experts in one tensor of the files, one by one where they are quantized. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class StackedExperts(NamedTuple):
    """How files name them, below the layer's part that has the experts.

    Attributes:
        gate_up: the tensor of all gates and ups, all rows of gate before those of up.
        down: that of all downs.
        inputs_first: their shape is [experts, in, out], not [experts, out, in].
        one: the linears of one expert, gate, up and down, below ``experts.<number>.``, which
            engines read too.
    """

    gate_up: str
    down: str
    inputs_first: bool
    one: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")

    def rules(self, prefix: str) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """ModelOpt's for import and export; ``prefix`` is that of the part with the experts.

        Called once torch is loaded.
        """
        from modelopt.torch.export.plugins.mcore_custom import (
            GatedMLPSlicing,
            NameRemapping,
            PackNameRemapping,
            UnpackNameRemapping,
        )

        names = {"linear_fc1": f"{prefix}{self.gate_up}", "linear_fc2": f"{prefix}{self.down}"}
        gate, up, down = self.one
        expert = f"{prefix}experts.{{}}."
        importing = {
            f"local_experts.{linear}_{group}": UnpackNameRemapping(
                name, {"layer_type": linear, "inputs_first": self.inputs_first}
            )
            for linear, name in names.items()
            for group in ("etp", "ep")
        }
        exporting = {
            f"local_experts.{linear}": PackNameRemapping(
                name, {"layer_type": linear, "transpose": self.inputs_first}
            )
            for linear, name in names.items()
        }
        both = {"use_packed_local_experts": True}
        return {**both, **importing}, {
            **both,
            **exporting,
            # Each with scales of its own.
            "quantized_experts.linear_fc1": GatedMLPSlicing(
                expert, {"gate_proj_name": gate, "up_proj_name": up}
            ),
            "quantized_experts.linear_fc2": NameRemapping(f"{expert}{down}."),
        }
