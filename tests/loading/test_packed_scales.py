"""Scales that no writer of codes gives are refused, in every format, packed and dense alike."""

import json

import pytest
import torch

import compress
from compress.checkpoint.export import export
from compress.checkpoint.packed import PackedLinears
from compress.checkpoint.packed_formats import codes_of_signed, with_fp16_scales
from compress.errors import CheckpointError
from compress.kernels.reference import dequantize
from compress.scheme import Scheme
from compress.storage.safetensors import CheckpointReader, save_tensors
from support.tiny_checkpoints import byte_tokenizer
from support.tiny_quantised import write_quantised

UP = "model.layers.1.mlp.up_proj"
FORMATS = {"compressed-tensors": "weight_scale", "gptq": "scales"}
every_format = pytest.mark.parametrize("format", FORMATS)


@pytest.fixture
def written(tmp_path):
    """`written(format, symmetric=True)`: a folder of 4 bits in groups of 32."""

    def write(format, symmetric=True):
        folder = tmp_path / "compressed-tensors"
        write_quantised(folder, [Scheme(4, 32, symmetric=symmetric)])
        byte_tokenizer().save_pretrained(folder)
        if format == "gptq":
            export(folder, "gptq", tmp_path / "gptq", round_scales=True)
        return tmp_path / format

    return write


def change_scale(folder, format, change):
    tensors = CheckpointReader(folder).tensors()
    name = f"{UP}.{FORMATS[format]}"
    tensors[name] = change(tensors[name].clone())
    save_tensors(folder / "model.safetensors", tensors)


def first_is(value):
    def change(scale):
        scale.view(-1)[0] = value
        return scale

    return change


def refused(folder, **options):
    with pytest.raises(CheckpointError) as caught:
        compress.load(folder, **options)
    message = str(caught.value)
    assert UP in message
    assert "scale" in message
    assert str(folder) in message
    assert "\n" not in message
    return message


packed_or_dense = pytest.mark.parametrize("packed", [True, False], ids=["packed", "dense"])


@packed_or_dense
@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.int64, torch.uint8, torch.bool])
@every_format
def test_scales_that_are_integers_are_refused(written, format, dtype, packed):
    folder = written(format)
    change_scale(folder, format, lambda scale: torch.ones_like(scale).to(dtype))
    assert str(dtype).removeprefix("torch.") in refused(folder, packed=packed)


@packed_or_dense
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@every_format
def test_scales_that_are_not_finite_are_refused(written, format, value, packed):
    folder = written(format)
    change_scale(folder, format, first_is(value))
    refused(folder, packed=packed)


@every_format
def test_a_scale_of_0_is_refused_unless_its_codes_are_zeros(written, format):
    folder = written(format)
    change_scale(folder, format, first_is(0))
    assert "0" in refused(folder, packed=True)


def test_a_group_of_zeros_may_have_a_scale_of_0(written):
    folder = written("compressed-tensors")
    linears = PackedLinears(folder)
    codes = linears.codes(UP)
    codes.codes[0, :32] = 2**3
    codes.scale[0, 0] = 0
    tensors = linears.reader.tensors()
    tensors |= {f"{UP}.{key}": tensor for key, tensor in linears.tensors(UP, codes).items()}
    save_tensors(folder / "model.safetensors", tensors)
    again = PackedLinears(folder).codes(UP)
    assert torch.equal(dequantize(again), dequantize(codes))
    compress.load(folder)


@packed_or_dense
@every_format
def test_negative_scales_are_ours_without_zero_points_only(written, format, packed):
    folder = written(format)
    change_scale(folder, format, lambda scale: -scale)
    compress.load(folder, packed=packed)


@packed_or_dense
@every_format
def test_negative_scales_beside_zero_points_are_refused(written, format, packed):
    folder = written(format, symmetric=False)
    change_scale(folder, format, lambda scale: -scale.abs())
    assert "zero points" in refused(folder, packed=packed)


@pytest.mark.parametrize("tiny", [1e-9, 1e30])
def test_scales_that_fp16_does_not_hold_leave_zeros(tiny):
    q = torch.randint(-8, 8, (4, 64), generator=torch.Generator().manual_seed(0))
    scale = torch.ones(4, 2)
    scale[1, 1] = tiny
    q[1, 32:] *= int(tiny < 1)  # only zeros have scales beyond fp16
    narrow = with_fp16_scales(codes_of_signed(q, scale, None, Scheme(4, 32)))
    expected = q.float()
    expected[1, 32:] = 0
    assert torch.equal(dequantize(narrow).float(), expected)
    assert bool((narrow.codes[1, 32:] == 8).all())


def test_an_export_with_a_vanishing_group_is_read_again(written, tmp_path):
    folder = written("compressed-tensors")
    change_scale(folder, "compressed-tensors", first_is(1e-12))
    export(folder, "gptq", tmp_path / "out", round_scales=True)
    compress.load(tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
