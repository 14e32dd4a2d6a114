"""The formats of packed linears: their tensors, the shapes of these, and codes from them and back.

pack-quantized   compressed-tensors, codes in 32-bit words, 2 to 8 bits
int-quantized    compressed-tensors, codes in int8, 2 to 8 bits
gptq, gptq_v2    codes in 32-bit words along the inputs, 2, 3, 4 and 8 bits

One scale for a whole weight is held as the same scale for every output: kernels know no other.

FORMATS["gptq"].shapes(Scheme(4, 128), (N, K))
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from compress.kernels.codes import (
    WIDTHS,
    Codes,
    group_count,
    read_compressed_tensors,
    read_gptq,
    sort_inputs,
    unsorted_inputs,
    write_compressed_tensors,
    write_gptq,
)
from compress.kernels.packing import WIDTHS as FILE_WIDTHS
from compress.kernels.packing import packed_columns
from compress.scheme import Scheme

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class PackedFormat:
    """One format. `main` is the tensor that holds the codes, and names what is packed.

    shapes(scheme, (N, K)): what one linear consists of. optional: tensors that may be absent.
    read(tensors, scheme, name) -> Codes, ValueError for what cannot be read; write(codes, scheme)
    is its inverse, without groups of inputs that follow each other anyway.
    """

    main: str
    companions: tuple[str, ...]
    optional: tuple[str, ...]
    widths: tuple[int, ...]
    shapes: Callable[[Scheme, tuple[int, int]], Shapes]
    read: Callable[[Mapping[str, Tensor], Scheme, str], Codes]
    write: Callable[[Codes, Scheme], dict[str, Tensor]]

    @property
    def suffixes(self) -> tuple[str, ...]:
        """All tensors that a linear may have."""
        return (self.main, *self.companions)


def _packed_shapes(scheme: Scheme, shape: tuple[int, int]) -> Shapes:
    (N, K), G = shape, group_count(shape[1], scheme.group_size)
    zeros = (packed_columns(N, scheme.bits), G)
    main = {"weight_packed": (N, packed_columns(K, scheme.bits)), "weight_shape": (2,)}
    return main | _companion_shapes(scheme, shape, zeros)


def _companion_shapes(scheme: Scheme, shape: tuple[int, int], zeros: tuple[int, ...]) -> Shapes:
    """Scales, zero points (of shape `zeros`, but for one of the whole weight) and act-order."""
    (N, K), G = shape, group_count(shape[1], scheme.group_size)
    shapes: Shapes = {
        "weight_scale": (1,) if scheme.per_tensor else (N, G),
        "weight_g_idx": (K,),
    }
    if not scheme.symmetric:
        shapes["weight_zero_point"] = (1,) if scheme.per_tensor else zeros
    return shapes


def _read_packed(tensors: Mapping[str, Tensor], scheme: Scheme, name: str) -> Codes:
    if not scheme.per_tensor:
        return read_compressed_tensors(tensors, scheme.bits, scheme.group_size, name)
    # one zero point alone is not packed
    shared = _shared(tensors, scheme, name, len(tensors["weight_packed"]))
    rest = {key: tensors[key] for key in tensors if key != "weight_zero_point"}
    weight = read_compressed_tensors(
        rest | {"weight_scale": shared["weight_scale"]}, scheme.bits, None, name
    )
    return replace(weight, zero=shared.get("weight_zero_point"))


def _write_packed(codes: Codes, scheme: Scheme) -> dict[str, Tensor]:
    zero = codes.zero if scheme.per_tensor else None
    tensors = write_compressed_tensors(codes if zero is None else replace(codes, zero=None))
    if zero is not None:
        tensors["weight_zero_point"] = _signed(zero, codes.bits)
    return _once(tensors) if scheme.per_tensor else tensors


def _int8_shapes(scheme: Scheme, shape: tuple[int, int]) -> Shapes:
    groups = (shape[0], group_count(shape[1], scheme.group_size))
    return {"weight": shape} | _companion_shapes(scheme, shape, groups)


def _read_int8(tensors: Mapping[str, Tensor], scheme: Scheme, name: str) -> Codes:
    codes = _unsigned(tensors["weight"], scheme.bits, f"{name}.weight")
    if scheme.per_tensor:
        shared = _shared(tensors, scheme, name, len(codes))
        scale, zero = shared["weight_scale"], shared.get("weight_zero_point")
    else:
        scale, zero = tensors["weight_scale"], tensors.get("weight_zero_point")
        if zero is not None:
            zero = _unsigned(zero, scheme.bits, f"{name}.weight_zero_point")
    weight = Codes(codes, scale, zero, scheme.bits, scheme.group_size)
    return sort_inputs(weight, tensors.get("weight_g_idx"), f"{name}.weight_g_idx")


def _write_int8(codes: Codes, scheme: Scheme) -> dict[str, Tensor]:
    inputs, g_idx = unsorted_inputs(codes)
    tensors = {"weight": _signed(inputs, codes.bits), "weight_scale": codes.scale}
    if codes.zero is not None:
        tensors["weight_zero_point"] = _signed(codes.zero, codes.bits)
    if codes.order is not None:
        tensors["weight_g_idx"] = g_idx
    return _once(tensors) if scheme.per_tensor else tensors


def _unsigned(integers: Tensor, bits: int, what: str) -> Tensor:
    """Signed integers as codes: c = q + 2^(b-1), and zero points likewise."""
    codes = integers.to(torch.int16) + 2 ** (bits - 1)
    if codes.numel() and not (codes.min() >= 0 and codes.max() < 2**bits):
        raise ValueError(f"{what} holds integers of more than {bits} bits")
    return codes.to(torch.uint8)


def _signed(codes: Tensor, bits: int) -> Tensor:
    return (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)


def _shared(tensors: Mapping[str, Tensor], scheme: Scheme, name: str, N: int) -> dict[str, Tensor]:
    """The scale of a whole weight, and its zero point, for each of N outputs [N, 1]."""
    found = {"weight_scale": tensors["weight_scale"]}
    if "weight_zero_point" in tensors:
        zero, what = tensors["weight_zero_point"], f"{name}.weight_zero_point"
        found["weight_zero_point"] = _unsigned(zero, scheme.bits, what)
    return {key: one.reshape(1, 1).repeat(N, 1) for key, one in found.items()}


def _once(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `_shared`."""
    shared = ("weight_scale", "weight_zero_point")
    return {key: t[:1].reshape(1) if key in shared else t for key, t in tensors.items()}


def _gptq_shapes(scheme: Scheme, shape: tuple[int, int]) -> Shapes:
    (N, K), G = shape, group_count(shape[1], scheme.group_size)
    return {
        "qweight": (packed_columns(K, scheme.bits), N),
        "qzeros": (G, packed_columns(N, scheme.bits)),
        "scales": (G, N),
        "g_idx": (K,),
    }


def _read_gptq(tensors: Mapping[str, Tensor], scheme: Scheme, name: str, version: int) -> Codes:
    return read_gptq(tensors, scheme.bits, scheme.group_size, version, name)


def _write_gptq(codes: Codes, scheme: Scheme, version: int) -> dict[str, Tensor]:
    return write_gptq(codes, version)


def _gptq(version: int) -> PackedFormat:
    """1 stores zero points less one, 2 as they are."""
    return PackedFormat(
        "qweight", ("qzeros", "scales", "g_idx"), ("g_idx",), WIDTHS,
        _gptq_shapes, partial(_read_gptq, version=version), partial(_write_gptq, version=version),
    )  # fmt: skip


FORMATS = {
    "pack-quantized": PackedFormat(
        "weight_packed", ("weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"),
        ("weight_g_idx",), tuple(FILE_WIDTHS), _packed_shapes, _read_packed, _write_packed,
    ),
    "int-quantized": PackedFormat(
        "weight", ("weight_scale", "weight_zero_point", "weight_g_idx"), ("weight_g_idx",),
        tuple(FILE_WIDTHS), _int8_shapes, _read_int8, _write_int8,
    ),
    "gptq": _gptq(1),
    "gptq_v2": _gptq(2),
}  # fmt: skip
