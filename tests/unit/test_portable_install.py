"""How the stand-ins get in place, what they report, and the CUDA calls they answer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import portable_helpers as helpers
import pytest
import torch

from post_training import portable
from post_training.portable import deferred, imports, left_out

ROOT = Path(__file__).resolve().parents[2]

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="stand-ins are for the CPU")


def test_install_is_idempotent_and_reports_what_runs():
    assert portable.install() is helpers.REPORT
    assert helpers.REPORT.cuda_stand_ins == (not torch.cuda.is_available())
    assert helpers.REPORT.transformer_engine in str(helpers.REPORT)
    if not helpers.REPORT.real_transformer_engine:
        assert helpers.REPORT.transformer_engine == "pure-PyTorch stand-in"
        assert helpers.REPORT.reason


def test_megatron_and_modelopt_take_the_package_for_transformer_engine():
    from megatron.core.extensions import transformer_engine as extension
    from megatron.core.utils import is_te_min_version
    from modelopt.torch.quantization.plugins import megatron

    assert extension.HAVE_TE
    assert megatron.HAS_TE
    # 2.2.0: attention masks while training through a cache; 2.8.0: learnable softmax offsets.
    assert is_te_min_version("2.8.0")
    if not helpers.REPORT.real_transformer_engine:
        # From here on megatron-core expects functions that the stand-in lacks.
        assert not is_te_min_version("2.9.0")


def test_no_folder_is_added_to_the_search_path():
    assert str(imports.SITE) not in sys.path


@pytest.mark.skipif(
    helpers.REPORT.real_transformer_engine, reason="the real Transformer Engine runs here"
)
def test_what_the_stand_in_leaves_out_is_replaced_or_refused_by_megatron():
    from megatron.core.extensions import transformer_engine as extension

    replaced = ("SplitAlongDim", "te_general_gemm", "te_parallel_cross_entropy", "fused_permute")
    refused = ("Fp8Padding", "get_cpu_offload_context")
    for name in (*replaced, *refused):
        assert getattr(extension, name) is None, name


@pytest.mark.parametrize("imported_before", [False, True])
def test_changes_to_a_module_are_made_once_whenever_it_is_imported(
    imported_before, tmp_path, monkeypatch
):
    name = f"changed_{imported_before}"
    (tmp_path / f"{name}.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    if imported_before:
        __import__(name)
    seen = []
    imports.on_import(name, lambda module: seen.append(module.value))
    module = __import__(name)
    assert seen == [1]
    assert module.__loader__ is module.__spec__.loader


@on_cpu
def test_install_after_megatron_is_an_error_that_names_the_remedy():
    script = (
        "import sys, types\n"
        "late = types.ModuleType('megatron.core.extensions.transformer_engine')\n"
        "late.HAVE_TE = False\n"
        "sys.modules[late.__name__] = late\n"
        "from post_training import portable\n"
        "portable.install()\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=helpers.ROOT, capture_output=True, text=True
    )
    assert run.returncode == 1
    assert "call it before the first import of megatron.core" in run.stderr


@on_cpu
def test_the_cpu_answers_for_the_current_device():
    assert torch.cuda.current_device() == torch.device("cpu")
    torch.cuda.synchronize()
    tensor = torch.ones(2)
    assert tensor.cuda() is tensor


@on_cpu
def test_memory_is_that_of_the_host():
    free, total = torch.cuda.mem_get_info()
    assert 0 < free <= total
    assert total > 2**28


@on_cpu
def test_random_state_is_that_of_the_cpu():
    state = torch.cuda.get_rng_state()
    first = torch.rand(3)
    torch.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)


@on_cpu
def test_megatrons_named_random_states_work_on_the_cpu():
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    tracker.add("experts", 5)
    state = tracker.get_states()
    with tracker.fork("experts"):
        first = torch.rand(3)
    tracker.set_states(state)
    with tracker.fork("experts"):
        assert torch.equal(torch.rand(3), first)


@on_cpu
def test_streams_and_events_have_happened():
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        event = stream.record_event()
    event.synchronize()
    assert stream == torch.cuda.current_stream()


@on_cpu
@pytest.mark.parametrize(("module", "compiled"), [("megatron.core.fusions", False), ("own", True)])
def test_functions_of_megatron_core_stay_as_they_are(module, compiled):
    program = "plain = torch.compile(abs)\nas_decorator = torch.compile(dynamic=True)(abs)"
    names = {"torch": torch, "__name__": module}
    exec(program, names)
    assert [names[each] is not abs for each in ("plain", "as_decorator")] == [compiled] * 2


@on_cpu
def test_literal_cuda_devices_mean_the_cpu_in_listed_modules_only():
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.transformer import utils

    assert schedules.torch.zeros([], device="cuda").device.type == "cpu"
    assert utils.get_default_causal_mask(3).tolist() == [
        [False, True, True],
        [False, False, True],
        [False, False, False],
    ]
    with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|NVIDIA"):
        torch.zeros([], device="cuda")


def test_the_start_loads_nothing_that_only_other_models_need():
    """5,679 modules before, 4,056 without them."""
    program = (
        "import sys; from post_training.distributed import session; session._import_packages(); "
        "print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split())
    assert {"megatron.core", "modelopt.torch.quantization.plugins.megatron"} <= loaded
    unwanted = """accelerate.accelerator compressed_tensors datasets diffusers pandas peft pyarrow
        scipy.stats sklearn torch_geometric torch._inductor.compile_fx transformers.trainer trl"""
    assert not loaded & {*unwanted.split(), *left_out.NAMES}
    assert len(loaded) < 4400
    assert "left out" not in done.stderr


def test_what_is_deferred_works_once_it_is_called():
    from megatron.core import jit
    from modelopt.torch.quantization.calib import histogram
    from scipy.stats import entropy

    assert histogram.entropy([1, 2], [2, 3]) == entropy([1, 2], [2, 3])
    calls = []

    @jit.jit_fuser
    def doubled(x, *, times=2):
        """Of it."""
        calls.append(x)
        return x * times

    assert doubled.__doc__ == "Of it."
    assert not calls
    assert doubled(torch.ones(2), times=3).tolist() == [3, 3]


class _Norm:
    @deferred.compiled_when_called
    def scaled(self, x):
        return x * 2


def test_a_deferred_method_knows_its_object():
    assert _Norm().scaled(torch.ones(1)).item() == 2
