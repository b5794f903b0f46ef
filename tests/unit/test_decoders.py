"""Hand-made tensors of each format decode to the values that the format defines."""

import subprocess
import sys

import pytest
import tools
import torch

from post_training.export.decoders.registry import DECODERS, SCALES
from post_training.quantization.engines import registry as engines
from post_training.quantization.engines.base import MIXED, MIXED_COMPRESSED


def decode(algorithm, stored, **scales):
    tensors = {f"layer.{name}": value for name, value in scales.items()}
    return DECODERS[algorithm].decode(tensors.__getitem__, "layer", stored)


def test_every_algorithm_that_an_engine_reads_has_a_decoder():
    assert set(engines.algorithms()) - {MIXED, MIXED_COMPRESSED} <= set(DECODERS)
    assert {"weight_scale", "weight_scale_2", "input_scale"} <= SCALES


def test_fp8_is_the_code_times_the_tensors_scale():
    codes = torch.tensor([[1.0, -448.0], [0.5, 2.0]]).to(torch.float8_e4m3fn)
    found = decode("FP8", codes, weight_scale=torch.tensor(0.25))
    assert found.tolist() == [[0.25, -112.0], [0.125, 0.5]]


def test_fp8_per_channel_is_the_code_times_the_rows_scale():
    codes = torch.tensor([[1.0, -448.0], [0.5, 2.0]]).to(torch.float8_e4m3fn)
    found = decode("FP8_PER_CHANNEL_PER_TOKEN", codes, weight_scale=torch.tensor([0.5, 2.0]))
    assert found.tolist() == [[0.5, -224.0], [1.0, 4.0]]


def test_fp8_blocks_have_a_scale_per_128_rows_and_columns():
    codes = torch.ones(256, 384).to(torch.float8_e4m3fn)
    scales = torch.tensor([[1.0, 2.0, 4.0], [0.5, 0.25, 8.0]]).reshape(2, 1, 3, 1)
    found = decode("FP8_PB_WO", codes, weight_scale=scales)
    assert [found[0, 127], found[127, 128], found[127, 383]] == [1.0, 2.0, 4.0]
    assert [found[128, 0], found[255, 255], found[128, 256]] == [0.5, 0.25, 8.0]


@pytest.mark.parametrize("algorithm", ["NVFP4", "W4A16_NVFP4"])
def test_nvfp4_unpacks_the_low_nibble_first_and_multiplies_both_scales(algorithm):
    packed = torch.zeros(1, 16, dtype=torch.uint8)
    packed[0, 0] = 0x7 | 0xF << 4  # 6, -6
    packed[0, 15] = 0x1 | 0xA << 4  # 0.5, -1, in the second block
    found = decode(
        algorithm,
        packed,
        weight_scale=torch.tensor([[2.0, 4.0]]).to(torch.float8_e4m3fn),
        weight_scale_2=torch.tensor(0.5),
    )
    assert found.shape == (1, 32)
    assert found[0, :2].tolist() == [6.0, -6.0]
    assert found[0, 30:].tolist() == [1.0, -2.0]
    assert found[0, 2:30].abs().max() == 0


def test_mxfp8_multiplies_a_power_of_two_per_32_inputs():
    codes = torch.ones(1, 64).to(torch.float8_e4m3fn)
    found = decode("MXFP8", codes, weight_scale=torch.tensor([[126, 130]], dtype=torch.uint8))
    assert found[0, :32].unique().tolist() == [0.5]
    assert found[0, 32:].unique().tolist() == [8.0]


@pytest.mark.parametrize(
    ("algorithm", "stored", "scale", "message"),
    [
        ("FP8", torch.ones(2, 2), torch.ones(()), "stored as torch.float32"),
        ("FP8", torch.ones(2, 2).to(torch.float8_e4m3fn), torch.ones(3), "scale of shape"),
        *(
            ("FP8_PER_CHANNEL_PER_TOKEN", torch.ones(2, 2).to(torch.float8_e4m3fn), *wrong)
            for wrong in (
                (torch.ones(2, 1), "scale of shape"),  # engines copy into one of [out]
                (torch.ones(2).bfloat16(), "scale is stored as torch.bfloat16"),
            )
        ),
        ("FP8_PB_WO", torch.ones(64, 128).to(torch.float8_e4m3fn), torch.ones(1), "whole blocks"),
        (
            "FP8_PB_WO",
            torch.ones(256, 128).to(torch.float8_e4m3fn),
            torch.ones(2, 1),
            "scale of shape",
        ),
        ("NVFP4", torch.zeros(1, 16, dtype=torch.uint8), torch.ones(1, 2), "layer scale is stored"),
        (
            "NVFP4",  # in blocks of 32
            torch.zeros(1, 16, dtype=torch.uint8),
            torch.ones(1, 1).to(torch.float8_e4m3fn),
            "scale of shape",
        ),
        (
            "MXFP8",
            torch.ones(1, 64).to(torch.float8_e4m3fn),
            torch.full((1, 2), 255, dtype=torch.uint8),
            "not a number",
        ),
        (
            "MXFP8",
            torch.ones(1, 64).to(torch.float8_e4m3fn),
            torch.ones(1, 1, dtype=torch.uint8),
            "scale of shape",
        ),
    ],
)
def test_a_tensor_in_another_form_is_refused(algorithm, stored, scale, message):
    with pytest.raises(ValueError, match=message):
        decode(algorithm, stored, weight_scale=scale, weight_scale_2=torch.ones(()))


def test_decoders_and_reader_share_nothing_with_the_exporter():
    code = (
        "import sys; from post_training.export import readback\n"
        "ours = {name for name in sys.modules if name.startswith('post_training.')}\n"
        "assert not {'modelopt', 'megatron'} & set(sys.modules)\n"
        "assert not [name for name in ours if 'quantization' in name or 'exporter' in name], ours"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=tools.environment())


@pytest.mark.parametrize("before", [["dtype"], ["torch_dtype"], ["torch_dtype", "dtype"], []])
def test_an_export_states_its_dtype_once(before):
    from post_training.export.model_folder import state_dtype

    config = dict.fromkeys(before, "float32")
    state_dtype(config, torch.bfloat16)
    assert config == {"torch_dtype" if before == ["torch_dtype"] else "dtype": "bfloat16"}
