"""Flags of megatron-core that say how a model is run, and that no stage can heed. No torch.

They are refused before any work, each with its own reason: megatron-core accepts most of them and
raises in the middle of a forward pass, or computes something else without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from post_training.common.errors import UsageError
from post_training.config.flags import spelled
from post_training.models import transformer_fields


@dataclass(frozen=True)
class Refusal:
    """Why a flag is refused; ``of`` says for which values, by default for all that switch it on."""

    cause: str
    remedy: str = "leave it out"
    of: Callable[[Any], bool] = lambda value: value not in (None, False)


_OTHER_RESULTS = Refusal("with it the model computes something else than its files describe")
_LOW_PRECISION = Refusal(
    "it asks Transformer Engine to compute in FP8 or FP4, which the stages' layers do not",
    "leave it out; quantize.sh makes a model in FP8 or NVFP4 (--export-quant-cfg)",
)
_NO_CUDA_GRAPHS = Refusal("no stage captures CUDA graphs")
_OTHER_ENGINE = Refusal("only megatron-core's own inference engine heeds it, which no stage runs")
_OWN_TESTS = Refusal("it is for megatron-core's own tests")


def _of(refusal: Refusal, fields: str) -> dict[str, Refusal]:
    return dict.fromkeys(fields.split(), refusal)


_BALANCING = ("aux_loss", "seq_aux_loss", "global_aux_loss", "none")

REFUSED: dict[str, Refusal] = {
    **_of(
        _OTHER_RESULTS,
        """use_mup flash_decode moe_router_force_load_balancing moe_router_force_biased
        moe_input_jitter_eps moe_expert_capacity_factor moe_router_topk_limited_devices
        fp32_residual_connection""",
    ),
    # These only add to a loss; Sinkhorn's and quantile balancing choose other experts.
    "moe_router_load_balancing_type": Refusal(
        _OTHER_RESULTS.cause + f" (known are {', '.join(_BALANCING)})",
        of=lambda value: not {*([value] if isinstance(value, str) else value)} <= {*_BALANCING},
    ),
    **_of(
        _LOW_PRECISION,
        """fp8 fp8_param fp8_output_proj fp8_dot_product_attention fp8_multi_head_attention
        fp4 fp4_param activation_func_fp8_input_store
        moe_router_padding_for_quantization moe_router_padding_for_fp8""",
    ),
    **_of(_NO_CUDA_GRAPHS, "enable_cuda_graph external_cuda_graph"),
    "cuda_graph_impl": Refusal(_NO_CUDA_GRAPHS.cause, of=lambda value: value not in (None, "none")),
    **_of(_OTHER_ENGINE, "cache_mla_latents"),
    **_of(_OWN_TESTS, "test_mode"),
    "config_logger_dir": Refusal(
        "megatron-core would write weights and inputs, pickled, over what is in that folder",
        of=lambda value: value not in (None, ""),
    ),
}


def check(given: Mapping[str, Any]) -> None:
    """UsageError for the first of the ``given`` fields that no stage can heed."""
    for name in sorted(REFUSED.keys() & given.keys()):
        refusal = REFUSED[name]
        if refusal.of(given[name]):
            raise UsageError(_spellings(name), refusal.cause, refusal.remedy)


def _spellings(name: str) -> str:
    others = transformer_fields.load()[name].get("spellings", [])
    return spelled(name) + (f" ({', '.join(others)})" if others else "")
