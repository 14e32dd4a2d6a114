"""The GPTQ layout against a reader written from its description, and its config as readers read it.

What GPTQModel itself makes of exported folders is in tests/interop/check_gptqmodel.py.
"""

import random
import re

import pytest
import torch

from compress.checkpoint.compressed_tensors import compress_module
from compress.checkpoint.gptq import (
    convert_module,
    pack_module,
    quantization_config,
    reader_notes,
    split_fusions,
    unpack_module,
)
from compress.scheme import Scheme
from support.gptq_reader import fields, read_naively

SHAPES = [(32, 64, 2), (33, 96, 3), (5, 40, 1), (1, 7, 1), (70, 33, 3)]  # N, K, G
WIDTHS = (2, 3, 4, 8)


def random_module(bits, N, K, G, asymmetric):
    generator = torch.Generator().manual_seed(bits)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    codes = torch.randint(low, high, (N, K), generator=generator, dtype=torch.int8)
    codes.view(-1)[:2] = torch.tensor([low, high - 1])[: codes.numel()]
    scale = torch.randn(N, G, generator=generator).half().float()  # of either sign
    zero = torch.randint(low, high, (N, G), generator=generator, dtype=torch.int8)
    zero.view(-1)[:2] = torch.tensor([low, high - 1])[: zero.numel()]
    return codes, scale, zero if asymmetric else None


# ---- tensors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(("asymmetric", "version"), [(False, 1), (False, 2), (True, 2)])
def test_what_is_read_is_codes_times_scales(bits, shape, asymmetric, version):
    N, K, G = shape
    codes, scale, zero = random_module(bits, N, K, G, asymmetric)
    tensors = pack_module(codes, scale, zero, bits, version)
    assert tensors["qweight"].shape == (-(-K * bits // 32), N)
    assert tensors["qzeros"].shape == (G, -(-N * bits // 32))
    shift = 0 if zero is None else zero[..., None].float()
    expected = ((codes.view(N, G, -1).float() - shift) * scale[..., None]).view(N, K)
    assert torch.equal(read_naively(tensors, bits, version), expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(("asymmetric", "version"), [(False, 1), (False, 2), (True, 2)])
def test_unpacking_undoes_packing(bits, shape, asymmetric, version):
    codes, scale, zero = random_module(bits, *shape, asymmetric)
    found = unpack_module(pack_module(codes, scale, zero, bits, version), bits, version)
    assert torch.equal(found[0], codes.short())
    assert torch.equal(found[1].float(), scale)
    expected = torch.zeros(scale.shape, dtype=torch.int16) if zero is None else zero.short()
    assert torch.equal(found[2], expected)


def test_three_bits_straddle_words_as_published():
    """32 codes in 3 words: ten, a split one, ten, a split one, ten."""
    codes = torch.arange(32, dtype=torch.int8)[None] * 5 % 8
    tensors = pack_module(codes - 4, torch.ones(1, 1), None, 3)
    words = [word & 0xFFFFFFFF for word in tensors["qweight"][:, 0].tolist()]
    c = codes[0].tolist()
    expected = [
        sum(c[i] << (3 * i) for i in range(10)) | (c[10] & 3) << 30,
        c[10] >> 2 | sum(c[i] << (3 * i - 32) for i in range(11, 21)) | (c[21] & 1) << 31,
        c[21] >> 1 | sum(c[i] << (3 * i - 64) for i in range(22, 32)),
    ]
    assert words == expected


@pytest.mark.parametrize(("bits", "ones"), [(2, 0x55555555), (4, 0x11111111), (8, 0x01010101)])
def test_version_1_stores_zero_points_less_one(bits, ones):
    codes, scale, _ = random_module(bits, 32, 64, 2, asymmetric=False)
    first, second = (pack_module(codes, scale, None, bits, version) for version in (1, 2))
    assert set(fields(first["qzeros"][0].tolist(), bits, 32)) == {2 ** (bits - 1) - 1}
    assert torch.equal((first["qzeros"].long() + ones).int(), second["qzeros"])
    assert all(torch.equal(first[k], second[k]) for k in first if k != "qzeros")


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("bits", WIDTHS)
def test_compressed_tensors_hold_the_same_streams(bits, asymmetric):
    codes, scale, zero = random_module(bits, 33, 96, 3, asymmetric)
    direct = pack_module(codes, scale, zero, bits, version=2)
    converted = convert_module(compress_module(codes, scale, zero, bits), bits, version=2)
    assert converted.keys() == direct.keys()
    assert all(torch.equal(converted[key], direct[key]) for key in direct)


def test_what_the_layout_cannot_hold_is_refused():
    codes, scale, zero = random_module(4, 32, 64, 2, asymmetric=True)
    with pytest.raises(ValueError, match="2, 3, 4 and 8 bits, got 5"):
        pack_module(codes, scale, None, 5)
    with pytest.raises(ValueError, match="version 2"):
        pack_module(codes, scale, zero, 4, version=1)
    with pytest.raises(ValueError, match=r"\[0, 7\]"):
        pack_module(codes, scale, None, 3)
    with pytest.raises(ValueError, match="beyond fp16"):
        pack_module(codes, scale * 1e5, None, 4)
    with pytest.raises(ValueError, match="one scale per row and group"):
        pack_module(codes, scale[:, :1].expand(-1, 5), None, 4)
    tensors = pack_module(codes, scale, None, 4)
    tensors["g_idx"] = tensors["g_idx"].flip(0)
    with pytest.raises(ValueError, match="permuted"):
        unpack_module(tensors, 4)


# ---- config.json, read as GPTQModel and vLLM read it --------------------------------------------

A, B, C = Scheme(4, 128), Scheme(2, 64), Scheme(8, None)
INNER = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
         "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
FUSED = {"self_attn.qkv_proj": INNER[:3], "mlp.gate_up_proj": INNER[4:6]}
LAYERS = 13  # two digits: 1 must not match 11


def resolve(config, name, rules=None):
    """The scheme that a reader gives to a module; None if it leaves it alone."""
    settings = {key: config[key] for key in ("bits", "group_size", "sym")}
    for pattern, override in rules or config.get("dynamic", {}).items():
        if re.match(pattern.removeprefix("-:"), name):
            if pattern.startswith("-:"):
                return None
            settings |= override
            break
    size = settings["group_size"]
    return Scheme(settings["bits"], None if size == -1 else size, settings["sym"])


def split(schemes):
    return (
        {name: scheme for name, scheme in schemes.items() if scheme is not None},
        [name for name, scheme in schemes.items() if scheme is None],
    )


@pytest.mark.parametrize("seed", range(5))
def test_every_module_gets_its_scheme_under_every_name(seed):
    draw = random.Random(seed)  # noqa: S311
    schemes = {}
    for layer in range(LAYERS):
        for part in (INNER[:3], INNER[3:4], INNER[4:6], INNER[6:]):
            chosen = draw.choice([A, A, B, C, Scheme(3, 32, symmetric=False), None])
            schemes |= {f"model.layers.{layer}.{inner}": chosen for inner in part}
    modules, plain = split(schemes)
    config = quantization_config(modules, plain)
    backwards = list(config["dynamic"].items())[::-1]
    fused = {
        f"model.layers.{layer}.{name}": schemes[f"model.layers.{layer}.{parts[0]}"]
        for layer in range(LAYERS)
        for name, parts in FUSED.items()
    }
    for name, scheme in (schemes | fused).items():
        assert resolve(config, name) == scheme
        assert resolve(config, name, backwards) == scheme  # whichever pattern is tried first
    assert not split_fusions(schemes)


def test_the_scheme_of_most_weights_needs_no_rule():
    modules = {f"model.layers.{i}.mlp.down_proj": B if i < 9 else A for i in range(LAYERS)}
    assert quantization_config(modules)["bits"] == B.bits
    weights = {name: 1 if scheme == B else 100 for name, scheme in modules.items()}
    config = quantization_config(modules, weights=weights)
    assert config["bits"] == A.bits
    assert len(config["dynamic"]) == 1
    uniform = quantization_config(dict.fromkeys(modules, C))
    assert "dynamic" not in uniform
    assert uniform["group_size"] == -1


def test_the_head_is_said_to_be_quantised_only_if_it_is():
    inside = {"model.layers.0.mlp.down_proj": A}
    assert quantization_config(inside)["lm_head"] is False
    config = quantization_config({"lm_head": C} | inside, weights={"lm_head": 10**9})
    assert config["lm_head"] is True
    assert config["bits"] == A.bits  # of the layers, however large the head is
    assert resolve(config, "lm_head") == C


def test_asymmetric_modules_make_it_version_2():
    modules = {"model.layers.0.mlp.up_proj": A, "model.layers.0.mlp.down_proj": B}
    assert quantization_config(modules)["checkpoint_format"] == "gptq"
    modules["model.layers.1.mlp.up_proj"] = Scheme(4, 128, symmetric=False)
    config = quantization_config(modules)
    assert config["checkpoint_format"] == config["format"] == "gptq_v2"


def test_transformers_is_told_which_linears_stay():
    """It replaces, in every layer, the linears whose name ends with one that is listed."""
    schemes = {f"model.layers.{i}.{n}": A for i in range(LAYERS) for n in INNER}
    left = {name: None for name in schemes if name.endswith("down_proj")}
    config = quantization_config(*split(schemes | left))
    (listed,) = config["modules_in_block_to_quantize"]
    replaced = {name for name in schemes if any(name.endswith(part) for part in listed)}
    assert replaced == schemes.keys() - left
    assert not reader_notes(*split(schemes | left))
    uneven = schemes | {"model.layers.2.mlp.down_proj": None}
    assert "modules_in_block_to_quantize" not in quantization_config(*split(uneven))
    assert "transformers" in " ".join(reader_notes(*split(uneven)))


def test_readers_that_will_not_load_it_are_named():
    schemes = {f"model.layers.{i}.{n}": A for i in range(2) for n in INNER}
    assert reader_notes(schemes) == []
    mixed = schemes | {"model.layers.1.mlp.down_proj": C}
    assert [note.split()[0] for note in reader_notes(mixed)] == ["transformers"]
    narrow = dict.fromkeys(schemes, B)
    assert [note.split()[0] for note in reader_notes(narrow)] == ["vLLM"]
    torn = schemes | {"model.layers.1.self_attn.k_proj": C}
    assert split_fusions(torn) == ["model.layers.1.self_attn.qkv_proj"]
    assert "model.layers.1.self_attn.qkv_proj" in reader_notes(torn)[0]
    assert "lm_head" in reader_notes(schemes | {"lm_head": A})[0]
