"""Quantize tiny models in many ways in one process set; ``test_quantization.py`` starts it.

The first argument is the job, the second the file for its results; the rest are quantize's flags.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch

import quantize
from post_training.checkpoints import loading
from post_training.checkpoints.source import find_source
from post_training.cli.stage import open_session
from post_training.common.errors import UsageError
from post_training.config import arguments
from post_training.quantization import formats, recipes
from post_training.quantization import options as quantization_choice


class Model:
    """Builds the plain model again and again, and quantizes it."""

    def __init__(self, args: Any, session: Any) -> None:
        from post_training.data import calibration_data
        from post_training.quantization import calibration

        self.args = args
        self.session = session
        self.source = find_source(args)
        self.samples = calibration_data.load_calibration_data(
            args.calib_dataset_path_or_name,
            loading.tokenizer(self.source, args),
            args.calib_size,
            args.calib_max_sequence_length,
        )
        self.run = lambda: calibration.Calibration(self.samples, args.calib_batch_size)

    def plain(self) -> Any:
        return loading.load(self.source, self.args, self.session)

    def quantized(self, choice: Any, model: Any = None, **flags: Any) -> tuple[Any, Any]:
        """The quantized model and the configuration."""
        args = copy.copy(self.args)
        vars(args).update(allow_unexportable=True, **flags)
        model = self.plain() if model is None else model
        return model, quantize.with_format(args, choice, model, self.run())

    def logits(self, model: Any) -> torch.Tensor:
        from whole_logits import prefill_logits

        return prefill_logits(model, self.samples.input_ids)


def every_format(build: Model) -> dict[str, Any]:
    """Each name of the table, on the plain model."""
    from post_training.quantization import coverage, quantizers

    plain = build.logits(build.plain())
    results = {}
    for name, row in formats.FORMATS.items():
        args = copy.copy(build.args)
        vars(args).update(export_quant_cfg=name, allow_unexportable=True)
        try:
            quantization_choice.check(args, build.source.described)
        except UsageError as error:
            results[name] = {"refused": error.cause}
            continue
        model, config = build.quantized(row)
        logits = build.logits(model)
        found = quantizers.judge_model(model, quantizers.method_of(config))
        reached = coverage.survey(model, config)
        results[name] = {
            "finite": bool(logits.isfinite().all()),
            "change": float((logits - plain).norm() / plain.norm()),
            "forms": sorted({str(each.form) for each in reached.quantized}),
            "exportable": found.exportable,
            "quant_algo": found.quant_algo,
            "bits": reached.bits_per_weight()[0],
        }
    return results


def flags(build: Model) -> dict[str, Any]:
    """What the flags do to the number of quantizers."""
    from post_training.quantization import coverage

    fp8 = formats.FORMATS["FP8_DEFAULT_CFG"]
    ways: dict[str, dict[str, Any]] = {
        "plain flags": {},
        "weight only": {"weight_only": True},
        "no qkv": {"disable_qkv_quant": True},
        "kv fp8": {"export_kv_cache_quant": "fp8"},
        "no qkv, kv fp8": {"disable_qkv_quant": True, "export_kv_cache_quant": "fp8"},
    }
    results: dict[str, Any] = {}
    for name, values in ways.items():
        model, config = build.quantized(fp8, **values)
        reached = coverage.survey(model, config)
        results[name] = {**reached.to_json(), "shown": reached.describe_left_out()}
    model, config = build.quantized(formats.FORMATS["NVFP4_OMLP_ONLY_CFG"])
    results["o_proj"] = coverage.survey(model, config).to_json()
    return results


def missing_scales(build: Model) -> dict[str, Any]:
    """Errors of recipes and models that leave a quantizer without a scale."""
    return {
        "no calibration": _error(lambda: build.quantized(recipes.find(build.args.references))),
        "bypassed": _error(lambda: _bypassed(build)),
        "nothing": _error(lambda: build.quantized(formats.FORMATS["NVFP4_EXPERTS_ONLY_CFG"])),
        "te spec": _error(lambda: _not_converted(build)),
    }


def _bypassed(build: Model) -> None:
    """An MLP that multiplies with its weights itself, as a fused kernel does."""
    from torch.nn import functional

    class FusedMLP(torch.nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.linear_fc1, self.linear_fc2 = inner.linear_fc1, inner.linear_fc2

        def forward(self, hidden: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
            first, second = (
                layer._parameters["weight"] for layer in (self.linear_fc1, self.linear_fc2)
            )
            gate, up = functional.linear(hidden, first).chunk(2, dim=-1)
            return functional.linear(functional.silu(gate) * up, second), None

    model = build.plain()
    layer = model.decoder.layers[0]
    layer.mlp = FusedMLP(layer.mlp)
    build.quantized(formats.FORMATS["W4A16_NVFP4_CFG"], model)


def _not_converted(build: Model) -> None:
    """A linear layer of a class that ModelOpt does not know."""

    class OwnLinear(torch.nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.weight = inner.weight

        def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, None]:
            return torch.nn.functional.linear(hidden, self.weight), None

    model = build.plain()
    mlp = model.decoder.layers[0].mlp
    mlp.linear_fc2 = OwnLinear(mlp.linear_fc2)
    build.quantized(formats.FORMATS["FP8_DEFAULT_CFG"], model)


def _error(work: Callable[[], Any]) -> str:
    try:
        work()
    except UsageError as error:
        return str(error)
    return ""


def reload(build: Model) -> dict[str, Any]:
    """Logits of quantized models before saving and after loading; ``--references`` lists them."""
    results = {}
    for case in build.args.references.split("|"):
        name, *words = case.split()
        args = copy.copy(build.args)
        args.save = f"{build.args.save}_{name}"
        for word in words:
            flag, _, value = word.partition("=")
            is_number = isinstance(getattr(args, flag), float)
            setattr(args, flag, float(value) if is_number else value or True)
        model, _ = quantize.quantize(args, build.session)
        again = copy.copy(build.args)
        again.load, again.pretrained_model_path = args.save, None
        source = find_source(again)
        loaded = loading.load(source, again, build.session)
        results[name] = {"saved": build.logits(model), "loaded": build.logits(loaded)}
    return results


def main() -> None:
    job, output, *words = sys.argv[1:]
    args = arguments.parse_namespace("quantize", quantize.add_arguments, lambda args: None, words)
    with open_session(args) as session:
        results = {
            "every_format": every_format,
            "flags": flags,
            "missing_scales": missing_scales,
            "reload": reload,
        }[job](Model(args, session))
        if session.is_main:
            torch.save(results, output)


if __name__ == "__main__":
    main()
