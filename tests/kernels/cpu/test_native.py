"""Compiling for this machine: once, kept where only the user can write, and never silently not."""

import os
import platform
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from compress.kernels.cpu import native
from compress.kernels.cpu.integers import QuadsWeight
from compress.kernels.cpu.products import cpu_matmul, pack_cpu
from compress.kernels.cpu.rows import RowsWeight
from compress.kernels.cpu.tiles import TilesWeight
from compress.kernels.linear import QuantLinear
from compress.kernels.reference import reference_matmul
from compress.kernels.user_cache import cache_directory
from support.weights import random_weight, relative_error

compiled = pytest.mark.skipif(native.find_compiler() is None, reason="no C++ compiler")


@pytest.fixture
def home(tmp_path, monkeypatch, fresh):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("MODELPRESS_NATIVE", raising=False)
    monkeypatch.delenv("MODELPRESS_CPU", raising=False)
    flags = tuple("-O0" if flag == "-O3" else flag for flag in native.FLAGS)  # compiles sooner
    monkeypatch.setattr(native, "FLAGS", flags)
    return tmp_path / "modelpress" / "native"


@compiled
def test_a_second_process_finds_what_the_first_one_compiled(home, monkeypatch):
    assert native.kernels() is not None
    assert native.reason().startswith("compiled kernels for ")
    (library,) = home.iterdir()
    native._outcome.cache_clear()
    monkeypatch.setattr(native, "COMPILE_SECONDS", 0)  # no time to compile again
    assert native.kernels() is not None
    assert list(home.iterdir()) == [library]


@compiled
@pytest.mark.parametrize("name", ["tiles.cpp", "rounding.cpp", "vectors.h"])
def test_another_source_is_compiled_anew(home, monkeypatch, tmp_path, name):
    native.kernels()
    for path in (*native.SOURCES, *native.HEADERS):
        other = tmp_path / path.name
        other.write_text(path.read_text() + "// changed\n" * (path.name == name))
    for group in ("SOURCES", "HEADERS"):
        paths = getattr(native, group)
        monkeypatch.setattr(native, group, tuple(tmp_path / path.name for path in paths))
    native._outcome.cache_clear()
    assert native.kernels() is not None
    assert len(list(home.iterdir())) == 2


def product_without_compiled_kernels():
    weight, x = random_weight(48, 64, 4, 32), torch.randn(2, 64)
    packed = pack_cpu(weight, torch.float32)
    assert type(packed) is RowsWeight
    assert relative_error(cpu_matmul(x, packed), reference_matmul(x, weight)) < 1e-6


def test_no_compiler_is_said_once_and_costs_no_result(home, monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/g++")
    with pytest.warns(RuntimeWarning, match=r"torch's operators.*no C\+\+ compiler was found"):
        product_without_compiled_kernels()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        product_without_compiled_kernels()


def test_a_compiler_that_fails_is_quoted(home, monkeypatch, tmp_path):
    broken = tmp_path / "broken-g++"
    broken.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo broken 1.0 && exit\n'
        'echo "In function f:" >&2\necho "error: bad day" >&2\nexit 1\n'
    )
    broken.chmod(0o700)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.warns(RuntimeWarning, match="failed: error: bad day"):
        product_without_compiled_kernels()
    assert list(home.iterdir()) == []


def test_a_folder_that_others_write_to_is_not_loaded_from(home, monkeypatch):
    home.mkdir(parents=True)
    home.chmod(0o777)
    with pytest.raises(PermissionError, match="can be written by other users"):
        cache_directory("native")
    if native.find_compiler():
        with pytest.warns(RuntimeWarning, match="can be written by other users"):
            assert native.kernels() is None


def compiled_library(home) -> Path:
    native.kernels()
    native._outcome.cache_clear()
    (library,) = home.iterdir()
    return library


def replace(path: Path, content: bytes) -> None:
    """Puts another file in its place: this process has the first one in its memory."""
    path.unlink()
    path.write_bytes(content)
    path.chmod(0o700)


PLANTED = {
    "that others may write to": lambda path: path.chmod(0o777),
    "that its group may write to": lambda path: path.chmod(0o770),
    "of one other byte": lambda path: replace(path, path.read_bytes()[:-1] + b"!"),
    "that was cut short": lambda path: replace(path, path.read_bytes()[:-1]),
    "that is empty": lambda path: replace(path, b""),
}


@compiled
@pytest.mark.parametrize("what", PLANTED)
def test_a_library_that_others_may_have_planted_is_not_loaded(home, monkeypatch, what):
    """After the folder itself was closed to others: what they had put there stays."""
    library = compiled_library(home)
    PLANTED[what](library)
    monkeypatch.setattr(native, "load", pytest.fail)
    with pytest.warns(RuntimeWarning, match=rf"{library.name}.*: remove it"):
        assert native.kernels() is None
    assert not native.reason().startswith("compiled")


@compiled
def test_a_library_of_another_user_is_not_loaded(home, monkeypatch):
    compiled_library(home)
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    monkeypatch.setattr(native, "load", pytest.fail)
    with pytest.warns(RuntimeWarning, match="can be written by other users: remove it"):
        assert native.kernels() is None


@compiled
def test_a_link_in_the_place_of_a_library_is_not_followed(home, monkeypatch, tmp_path):
    library = compiled_library(home)
    library.rename(tmp_path / "elsewhere.so")
    library.symlink_to(tmp_path / "elsewhere.so")
    monkeypatch.setattr(native, "load", pytest.fail)
    with pytest.warns(RuntimeWarning, match="not a plain file: remove it"):
        assert native.kernels() is None


@compiled
@pytest.mark.parametrize("mask", [0o000, 0o002, 0o077])
def test_what_was_compiled_is_loaded_again_under_any_umask(home, mask):
    before = os.umask(mask)
    try:
        compiled_library(home)
        assert native.kernels() is not None
    finally:
        os.umask(before)


def test_a_choice_is_no_warning(uncompiled):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native.kernels() is None
    assert "MODELPRESS_NATIVE=0" in native.reason()


@compiled
def test_a_weight_of_compiled_kernels_is_refused_where_there_are_none(monkeypatch, fresh):
    packed = TilesWeight.pack(random_weight(48, 64, 4, 32))
    monkeypatch.setenv("MODELPRESS_NATIVE", "0")
    native._outcome.cache_clear()
    with pytest.raises(ValueError, match=r"packed for compiled kernels, found .*MODELPRESS"):
        cpu_matmul(torch.randn(1, 64), packed)


@compiled
def test_what_lies_behind_a_pointer_is_checked():
    """A tensor that is not what the library takes it for is refused, and never read."""
    library, weight = native.kernels(), random_weight(64, 128, 4, 32, False, torch.float32)
    tiles, x = TilesWeight.pack(weight), torch.randn(2, 128)
    good = {"packed": tiles.packed, "scale": tiles.scale, "zero": tiles.zero, "group_size": 32}
    library.tiles_matmul(x, **good, bits=4)
    for name, wrong, said in (
        ("packed", tiles.packed[:, :-1], "codes in tiles"),
        ("packed", tiles.packed.to(torch.int16), "packed bytes"),
        ("packed", tiles.packed.transpose(1, 2).contiguous().transpose(1, 2), "packed bytes"),
        ("scale", tiles.scale[:-1], "a scale for each group"),
        ("scale", tiles.scale.T.contiguous().T, "a scale for each group"),
        ("zero", tiles.zero[:-1], "zero points like scales"),
        ("zero", tiles.zero.int(), "zero points like scales"),
        ("zero", tiles.zero.T.contiguous().T, "zero points side by side"),
        ("group_size", 33, "pairs of inputs in a group"),
    ):
        with pytest.raises(ValueError, match=said):
            library.tiles_matmul(x, **good | {name: wrong}, bits=4)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bits", "symmetric"), [(2, True), (3, False), (4, True), (8, False)])
def test_operators_give_what_a_call_by_address_does(monkeypatch, dtype, bits, symmetric):
    weight = random_weight(70, 66, bits, 32, symmetric, torch.bfloat16)
    packed, bias = TilesWeight.pack(weight), torch.randn(70, dtype=dtype)
    for M in (0, 1, 7):
        x = torch.randn(66, M, dtype=dtype).T
        assert native.operators(x) is not None
        y = cpu_matmul(x, packed, bias)
        with monkeypatch.context() as by_address:
            by_address.setattr(native, "_operators", None)
            assert torch.equal(cpu_matmul(x, packed, bias), y)
        assert y.dtype == dtype


@compiled
def test_operators_check_what_they_are_given():
    weight, integers = random_weight(64, 128, 4, 32, False), random_weight(64, 128, 4, 32)
    tiles, quads, x = TilesWeight.pack(weight), QuadsWeight.pack(integers), torch.randn(2, 128)
    found = native.operators(x)
    good = [x, tiles.packed, tiles.scale, tiles.zero, None, 4, 32]
    found.tiles_matmul(*good)
    for at, wrong, said in (
        (0, x[0], "rows of activations"),
        (0, x.double(), "fp16, bf16 or fp32"),
        (0, x[:, :-2], "packed codes"),
        (1, tiles.packed[:, :-1], "packed codes"),
        (1, tiles.packed.to(torch.int16), "packed codes"),
        (1, tiles.packed.transpose(1, 2).contiguous().transpose(1, 2), "packed codes"),
        (2, tiles.scale[:-1], "a scale for each group"),
        (2, tiles.scale.T.contiguous().T, "a scale for each group"),
        (2, tiles.scale.double(), "fp16, bf16 or fp32"),
        (3, tiles.zero[:-1], "zero points like scales"),
        (3, tiles.zero.int(), "zero points like scales"),
        (4, torch.randn(63), "a bias"),
        (5, 5, "codes of 2, 3, 4 or 8 bits"),
        (6, 33, "groups of whole steps"),
    ):
        with pytest.raises(RuntimeError, match=f"compiled kernels expected {said}"):
            found.tiles_matmul(*good[:at], wrong, *good[at + 1 :])
    if not native.kernels().takes_quads():
        return
    values = torch.ones(2, 128, dtype=torch.int8)
    good = [values, torch.ones(2), quads.packed, quads.scale, None, None, 4, 4, 32, torch.float32]
    found.quads_matmul(*good)
    for at, wrong, said in (
        (0, values.int(), "rows of int8"),
        (0, values.T.contiguous().T, "rows of int8"),
        (1, torch.ones(3), "a scale for each token"),
        (2, quads.packed[:-1], "packed codes"),
        (7, 3, "codes in 2, 4 or 8 bits"),
        (8, 34, "groups of whole steps"),
    ):
        with pytest.raises(RuntimeError, match=f"compiled kernels expected {said}"):
            found.quads_matmul(*good[:at], wrong, *good[at + 1 :])


@compiled
def test_where_operators_do_not_compile_products_are_called_by_address(home, monkeypatch):
    monkeypatch.setattr(native, "TORCH_FLAGS", ())  # no headers
    assert native.kernels() is not None
    assert "called by address" in native.reason()
    x = torch.randn(2, 64)
    assert native.operators(x) is None
    weight = random_weight(48, 64, 4, 32)
    y = cpu_matmul(x, pack_cpu(weight, torch.float32))
    assert relative_error(y, reference_matmul(x, weight)) < 1e-6


@compiled
def test_no_gradient_is_made_up():
    """Of activations that ask for one; there is none yet."""
    x = torch.randn(2, 64, requires_grad=True)
    y = cpu_matmul(x, pack_cpu(random_weight(48, 64, 4, 32), torch.float32))
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        y.sum().backward()


@compiled
def test_bf16_that_the_processor_cannot_multiply_is_widened(monkeypatch):
    weight = random_weight(70, 66, 8, 32, False, torch.bfloat16)
    x = torch.randn(5, 66).bfloat16()
    packed = TilesWeight.pack(weight)
    expected = reference_matmul(x, weight)
    monkeypatch.setattr(native, "_operators", None)
    for takes in {False, native.kernels().takes_bf16()}:
        monkeypatch.setattr(native.Kernels, "takes_bf16", lambda self, takes=takes: takes)
        assert relative_error(cpu_matmul(x, packed), expected) < 2**-8


@compiled
@pytest.mark.skipif(platform.machine() != "x86_64", reason="names an x86 processor")
@pytest.mark.parametrize("level", ["avx2", "generic"])
def test_a_lower_level_has_nothing_of_a_higher_one(home, monkeypatch, level):
    """Each has a library of its own, and nothing of AVX-512 is in either; VNNI in none."""
    native.kernels()
    monkeypatch.setenv("MODELPRESS_CPU", level)
    native._outcome.cache_clear()
    library = native.kernels()
    assert not library.takes_bf16()
    expected = {"avx2": ("AVX2", True), "generic": (native.BASELINE, False)}
    assert (library.instructions(), library.takes_quads()) == expected[level]
    assert len(list(home.iterdir())) == 2


def test_a_level_that_is_none_is_one_line(home, monkeypatch):
    monkeypatch.setenv("MODELPRESS_CPU", "avx3")
    with pytest.raises(ValueError, match=r"^MODELPRESS_CPU: expected native, avx2, generic, found"):
        native.kernels()
    monkeypatch.setenv("MODELPRESS_CPU", "avx2")
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with pytest.raises(ValueError, match="is for x86-64 processors, this one is aarch64"):
        native.kernels()


@compiled
@pytest.mark.skipif(platform.machine() != "x86_64", reason="names an x86 processor")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_processor_without_wide_vectors_gets_the_same_products(home, monkeypatch, dtype):
    monkeypatch.setenv("MODELPRESS_CPU", "generic")
    assert native.kernels() is not None
    assert native.reason().endswith(", MODELPRESS_CPU=generic")
    assert not native.kernels().takes_bf16()
    assert not native.kernels().takes_quads()
    for bits, rows in ((3, 1), (8, 7)):
        weight = random_weight(70, 66, bits, 32, False, dtype)
        x = torch.randn(rows, 66).to(dtype)
        y = cpu_matmul(x, TilesWeight.pack(weight))
        limit = 1e-6 if dtype == torch.float32 else 2**-8
        assert relative_error(y, reference_matmul(x, weight)) < limit
        layer = QuantLinear(random_weight(70, 66, bits, 32, True, dtype), None, dtype, 8)
        values, scale = native.kernels().round_tokens(x, 127.5, 128)
        y = layer(x)
        expected = reference_matmul(values.double() * scale[:, None].double(), layer.codes())
        assert relative_error(y, expected) < limit


GUARDED = """
import ctypes, mmap, sys
sys.path.insert(0, sys.argv[1])
import torch
from dataclasses import replace
from support.weights import random_weight, relative_error
from compress.kernels.activations import integer_matmul, quantize_tokens
from compress.kernels.cpu.products import cpu_matmul, pack_integers
from compress.kernels.cpu.integers import QuadsWeight
from compress.kernels.cpu.tiles import TilesWeight
from compress.kernels.reference import reference_matmul

mprotect, kept = ctypes.CDLL(None).mprotect, []
mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

def last(tensor):
    # the same tensor, right before a page that nobody may read
    size = -(-tensor.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    area = mmap.mmap(-1, size + mmap.PAGESIZE)
    kept.append(area)
    moved = torch.frombuffer(area, dtype=tensor.dtype, count=tensor.numel(),
                             offset=size - tensor.nbytes).view(tensor.shape)
    moved.copy_(tensor)
    end = moved.data_ptr() + moved.nbytes
    assert end % mmap.PAGESIZE == 0 and mprotect(end, mmap.PAGESIZE, 0) == 0
    return moved

for bits in (2, 3, 4, 8):
    for symmetric in (True, False):
        for dtype in (torch.float32, torch.bfloat16):
            for M, N, K, group in ((1, 1, 63, None), (1, 130, 97, 32), (7, 65, 129, None)):
                weight = random_weight(N, K, bits, group, symmetric, dtype)
                packed = TilesWeight.pack(weight)
                tensors = {name: last(getattr(packed, name)) for name in ("packed", "scale")}
                if not symmetric:
                    tensors["zero"] = last(packed.zero)
                x = last(torch.randn(M, K).to(dtype))
                y = cpu_matmul(x, replace(packed, **tensors))
                terms = x.abs().double().sum(1, keepdim=True)
                assert ((y - reference_matmul(x, weight)).abs() <= 2**-6 * terms).all()

                packed = pack_integers(weight)
                tensors = {name: last(getattr(packed, name)) for name in tensors}
                values, scale = map(last, quantize_tokens(x, 8))
                y = integer_matmul(values, scale, replace(packed, **tensors), None, torch.float32)
                expected = reference_matmul(values.double() * scale.double()[:, None], weight)
                assert ((y - expected).abs() <= 2**-6 * terms).all()
print("read", len(kept))
"""


@compiled
@pytest.mark.skipif(sys.platform == "win32", reason="protects pages as POSIX does")
def test_nothing_is_read_beyond_its_end():
    """Each tensor ends where memory does: one byte more, and the process is gone."""
    child = subprocess.run(
        [sys.executable, "-c", GUARDED, str(Path(__file__).parents[2])],
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    assert child.stdout == "read 384\n"
