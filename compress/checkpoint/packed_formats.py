"""The formats of packed linears: their tensors, the shapes of these, and codes from them and back.

pack-quantized   compressed-tensors, codes in 32-bit words, 2 to 8 bits
int-quantized    compressed-tensors, codes in int8, 2 to 8 bits
gptq, gptq_v2    codes in 32-bit words along the inputs, 2, 3, 4 and 8 bits

FORMATS["gptq"].shapes(ModuleScheme(4, 128), (N, K))
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from compress.checkpoint.compressed_tensors import ModuleScheme
from compress.kernels.layout import (
    WIDTHS,
    Codes,
    group_count,
    read_compressed_tensors,
    read_gptq,
    write_compressed_tensors,
    write_gptq,
)
from compress.kernels.packing import WIDTHS as FILE_WIDTHS
from compress.kernels.packing import packed_columns

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class PackedFormat:
    """One format. `main` is the tensor that holds the codes, and names what is packed.

    shapes(scheme, (N, K)): what one linear consists of. optional: tensors that may be absent.
    read(tensors, scheme, name) -> Codes, ValueError for what cannot be read; write is its inverse.
    """

    main: str
    companions: tuple[str, ...]
    optional: tuple[str, ...]
    widths: tuple[int, ...]
    shapes: Callable[[ModuleScheme, tuple[int, int]], Shapes]
    read: Callable[[Mapping[str, Tensor], ModuleScheme, str], Codes]
    write: Callable[[Codes], dict[str, Tensor]]

    @property
    def suffixes(self) -> tuple[str, ...]:
        """All tensors that a linear may have."""
        return (self.main, *self.companions)


def _packed_shapes(scheme: ModuleScheme, shape: tuple[int, int]) -> Shapes:
    (N, K), G = shape, group_count(shape[1], scheme.group_size)
    shapes: Shapes = {
        "weight_packed": (N, packed_columns(K, scheme.bits)),
        "weight_scale": (N, G),
        "weight_shape": (2,),
    }
    if not scheme.symmetric:
        shapes["weight_zero_point"] = (packed_columns(N, scheme.bits), G)
    return shapes


def _read_packed(tensors: Mapping[str, Tensor], scheme: ModuleScheme, name: str) -> Codes:
    return read_compressed_tensors(tensors, scheme.bits, scheme.group_size, name)


def _int8_shapes(scheme: ModuleScheme, shape: tuple[int, int]) -> Shapes:
    (N, K), G = shape, group_count(shape[1], scheme.group_size)
    shapes: Shapes = {"weight": (N, K), "weight_scale": (N, G)}
    if not scheme.symmetric:
        shapes["weight_zero_point"] = (N, G)
    return shapes


def _read_int8(tensors: Mapping[str, Tensor], scheme: ModuleScheme, name: str) -> Codes:
    """Signed integers as codes: c = q + 2^(b-1), and zero points likewise."""
    middle, largest = 2 ** (scheme.bits - 1), 2**scheme.bits - 1

    def unsigned(key: str) -> Tensor:
        codes = tensors[key].to(torch.int16) + middle
        if codes.numel() and not (codes.min() >= 0 and codes.max() <= largest):
            raise ValueError(f"{name}.{key} holds integers of more than {scheme.bits} bits")
        return codes.to(torch.uint8)

    zero = unsigned("weight_zero_point") if "weight_zero_point" in tensors else None
    return Codes(unsigned("weight"), tensors["weight_scale"], zero, scheme.bits, scheme.group_size)


def _write_int8(codes: Codes) -> dict[str, Tensor]:
    middle = 2 ** (codes.bits - 1)
    tensors = {
        "weight": (codes.codes.to(torch.int16) - middle).to(torch.int8),
        "weight_scale": codes.scale,
    }
    if codes.zero is not None:
        tensors["weight_zero_point"] = (codes.zero.to(torch.int16) - middle).to(torch.int8)
    return tensors


def _gptq_shapes(scheme: ModuleScheme, shape: tuple[int, int]) -> Shapes:
    (N, K), G = shape, group_count(shape[1], scheme.group_size)
    return {
        "qweight": (packed_columns(K, scheme.bits), N),
        "qzeros": (G, packed_columns(N, scheme.bits)),
        "scales": (G, N),
        "g_idx": (K,),
    }


def _read_gptq(
    tensors: Mapping[str, Tensor], scheme: ModuleScheme, name: str, version: int
) -> Codes:
    return read_gptq(tensors, scheme.bits, scheme.group_size, version, name)


def _gptq(version: int) -> PackedFormat:
    """1 stores zero points less one, 2 as they are."""
    return PackedFormat(
        "qweight", ("qzeros", "scales", "g_idx"), ("g_idx",), WIDTHS,
        _gptq_shapes, partial(_read_gptq, version=version), partial(write_gptq, version=version),
    )  # fmt: skip


FORMATS = {
    "pack-quantized": PackedFormat(
        "weight_packed", ("weight_scale", "weight_zero_point", "weight_shape"), (),
        tuple(FILE_WIDTHS), _packed_shapes, _read_packed, write_compressed_tensors,
    ),
    "int-quantized": PackedFormat(
        "weight", ("weight_scale", "weight_zero_point"), (),
        tuple(FILE_WIDTHS), _int8_shapes, _read_int8, _write_int8,
    ),
    "gptq": _gptq(1),
    "gptq_v2": _gptq(2),
}  # fmt: skip
COMPRESSED_TENSORS = ("pack-quantized", "int-quantized")
