"""Nemotron-H: its quantized Mamba layers reach an engine, and a pattern is needed to build one."""

from __future__ import annotations

import pytest
import tools
from safetensors.torch import save_file
from test_quantized_export import TOLERANCES, engine_logits, stored_tensors

from post_training.common.errors import UsageError
from post_training.models import builder
from post_training.models.architecture import Architecture
from post_training.models.builder import BuildOptions
from post_training.models.families import registry as families
from post_training.quantization import model_checks


def test_engine_logits_of_mamba_layers_equal_the_quantized_models(tmp_path):
    source, ids, jobs = tmp_path / "source", tools.tokens(), []
    reference = tools.random_model(source, "nemotron-h", hybrid_override_pattern="M-*M")
    whole = tools.random_model(tmp_path / "whole", "nemotron-h", moe_latent_size=None)
    jobs.append(
        tools.logits_job(tmp_path, ids, "--pretrained-model-path", tmp_path / "whole", "--fp32")
    )
    plain = {name: each.clone() for name, each in reference.state_dict().items()}
    text = tools.write_texts(tmp_path / "text.jsonl")
    for name in TOLERANCES:
        work = tmp_path / name
        flags = ("--export-quant-cfg", name, "--skip-generate", "--calib-dataset", text)
        flags += ("--calib-size", 8, "--calib-max-sequence-length", 64)
        jobs += [
            ("quantize", ("--pretrained-model-path", source, "--save", work, "--fp32", *flags)),
            tools.logits_job(tmp_path / f"{name} logits", ids, "--load", work, "--fp32"),
            ("export", ("--load", work, "--export-dir", tmp_path / f"{name} hf", "--fp32")),
        ]
    tools.run_stages(*jobs)
    # Experts without latents, which the family's tiny model has.
    difference = tools.read_logits(tmp_path) - tools.transformers_logits(whole, ids)
    assert difference.abs().max() < 1e-4
    for name, tolerance in TOLERANCES.items():
        stored = stored_tensors(tmp_path / f"{name} hf")
        renamed = {key.replace("backbone.", "model.", 1): each for key, each in stored.items()}
        (tmp_path / f"{name} named").mkdir()
        save_file(renamed, tmp_path / f"{name} named" / "model.safetensors")
        reference.load_state_dict(plain)
        actual, quantized = engine_logits(tmp_path / f"{name} named", reference, ids)
        wanted = tools.read_logits(tmp_path / f"{name} logits")
        # Two Mamba layers and an MLP with two projections each, attention with four.
        assert quantized == 10
        assert (actual - wanted).abs().mean() < tolerance * wanted.std()


def test_a_hybrid_without_a_pattern_and_methods_that_were_not_tried_are_refused():
    values = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
    with pytest.raises(UsageError, match="hybrid-layer-pattern"):
        builder._hybrid_model(
            Architecture(values, 64, 64, model_type="HybridModel"), None, BuildOptions()
        )
    for name in ("nemotron-h", "qwen3-next"):
        found = families.from_huggingface(tools.FAMILIES[name].tiny_config())
        for method in ("awq_lite", "smoothquant", "gptq"):
            with pytest.raises(UsageError, match=f"{method} was not tried"):
                model_checks.check(found, "X", {}, False, method=method, weights=None)
        model_checks.check(found, "X", {}, False, method="max", weights=None)
