"""Quantize tiny models in many ways in one process set; ``test_quantization.py`` starts it.

The first argument is the job, the second the file for its results; the rest are quantize's flags.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import torch

import quantize
from post_training.checkpoints import loading
from post_training.checkpoints.source import find_source
from post_training.cli.stage import make_plan, open_session
from post_training.common.errors import UsageError
from post_training.config import arguments
from post_training.quantization import options as quantization_options
from post_training.quantization import recipes
from post_training.quantization.formats import registry as formats
from post_training.quantization.options import QuantizeOptions


class Model:
    """Builds the plain model again and again, and quantizes it."""

    def __init__(self, words: list[str], options: QuantizeOptions, session: Any) -> None:
        from post_training.data import options as calibration_options
        from post_training.inference.batching import Batching
        from post_training.quantization import calibration

        self.words = words
        self.options = options
        self.session = session
        self.source = find_source(options)
        asked = options.calibration
        self.samples = calibration_options.load(
            asked,
            loading.tokenizer(self.source, options),
            self.source.architecture,
            options.seed,
        )
        self.data = lambda: calibration.Calibration(
            self.samples, Batching(asked.calib_batch_size, "--calib-batch-size")
        )

    def plain(self) -> Any:
        return loading.load(self.source, self.options, self.session)

    def changed(self, **flags: Any) -> QuantizeOptions:
        """The options with others, exportable or not."""
        return dataclasses.replace(self.options, allow_unexportable=True, **flags)

    def quantized(self, choice: Any, model: Any = None, **flags: Any) -> tuple[Any, Any]:
        """The quantized model and the configuration."""
        from post_training.quantization import ptq

        model = self.plain() if model is None else model
        return model, ptq.with_format(model, self.changed(**flags), choice, self.data())

    def logits(self, model: Any) -> torch.Tensor:
        from whole_logits import prefill_logits

        return prefill_logits(model, self.samples.input_ids)


def every_format(build: Model) -> dict[str, Any]:
    """Each name of the table, on the plain model."""
    from post_training.quantization import coverage, quantizers
    from post_training.quantization.configuration import method_of

    plain = build.logits(build.plain())
    results = {}
    for name, row in formats.FORMATS.items():
        options = build.changed(export_quant_cfg=name)
        try:
            quantization_options.check(options, row, build.source.described)
        except UsageError as error:
            results[name] = {"refused": error.cause}
            continue
        model, config = build.quantized(row)
        logits = build.logits(model)
        found = quantizers.judge_model(model, method_of(config))
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
        "no calibration": _error(
            lambda: build.quantized(recipes.find(build.options.smoke.references))
        ),
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
    """Logits of quantized models before saving and after loading; ``--references`` lists them.

    A case is a name and further flags: ``fp8 --export-quant-cfg FP8_DEFAULT_CFG``.
    """
    results = {}
    for case in build.options.smoke.references.split("|"):
        name, *flags = case.split()
        save = f"{build.options.save}_{name}"
        words = [*build.words, *flags, "--save", save, "--skip-generate"]
        model = quantize.quantize(make_plan(quantize.STAGE, words), build.session).model
        again = dataclasses.replace(build.options, load=save, pretrained_model_path=None)
        loaded = loading.load(find_source(again), again, build.session)
        results[name] = {"saved": build.logits(model), "loaded": build.logits(loaded)}
    return results


def main() -> None:
    job, output, *words = sys.argv[1:]
    options = arguments.parse("quantize", QuantizeOptions, words)
    with open_session(options) as session:
        results = {
            "every_format": every_format,
            "flags": flags,
            "missing_scales": missing_scales,
            "reload": reload,
        }[job](Model(words, options, session))
        if session.is_main:
            torch.save(results, output)


if __name__ == "__main__":
    main()
