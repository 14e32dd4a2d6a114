"""From the layouts of checkpoint files to the layout that kernels read, exact both ways.

    file tensors  <->  Codes (one byte per weight)  <->  KernelWeight (int32 words)

A weight of N outputs and K inputs is w = (c - z) * s, with unsigned codes c of b bits, one scale s
and zero point z for each output and each group of `group_size` inputs. Files: compressed-tensors
`pack-quantized` and GPTQ in versions 1 and 2 (packing.py says how the bits lie).

Kernel layout. Inputs are cut into blocks of 16 * E columns, E = 32 // b codes to a word:

    words [blocks * 16, N] int32:   bits [b*j, b*j + b) of words[16*i + r, n] are the code of
                                    output n and input (16*i) * E + 16*j + r,   0 <= r < 16

So a tile of words loads without gaps along N, the same shift of a whole tile gives 16 neighbouring
inputs, and these lie in one group, whatever its size (a multiple of 16). 3 bits do not divide a
word: they are a plane of 2 bits, laid out as above (E = 16), and one of 1 bit, where

    high  [ceil(blocks / 2) * 16, N] int32:   bit 2*j + i % 2 of high[16*(i // 2) + r, n]

is the third bit of the same code. Columns beyond K are 0 and meet no input. A symmetric weight,
z = 2^(b-1) everywhere, has no zero tensor. GPTQ's act-order permutes inputs: they are sorted by
group, and `order` says which input each column takes.

    weight = pack_kernel(read_compressed_tensors(tensors, bits=3, group_size=128))
"""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from compress.kernels.packing import WIDTHS as FILE_WIDTHS
from compress.kernels.packing import pack_rows, packed_columns, unpack_rows

WIDTHS = (2, 3, 4, 8)
ROWS = 16  # the least depth of a tensor-core product, so the least group that needs no gather


@dataclass(frozen=True)
class Codes:
    """A quantised weight, one byte per code.

    codes uint8 [N, K]; scale [N, G] in the file's dtype; zero uint8 [N, G], None if symmetric;
    G = ceil(K / group_size), 1 if group_size is None. order int64 [K] or None: column k of `codes`
    multiplies input order[k].
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int
    group_size: int | None
    order: Tensor | None = None

    def to(self, device: torch.device | str) -> "Codes":
        """The same weight on another device."""
        return replace(self, **{name: t.to(device) for name, t in tensors_of(self).items()})


@dataclass(frozen=True)
class KernelWeight:
    """A quantised weight as kernels read it; the tensors are described at the file's head.

    scale [G, N] and zero uint8 [G, N] lie along N like the words do.
    """

    words: Tensor
    high: Tensor | None
    scale: Tensor
    zero: Tensor | None
    bits: int
    group_size: int | None
    columns: int
    order: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs, [N, K]."""
        return self.words.shape[1], self.columns

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in tensors_of(self).values())

    def to(self, device: torch.device | str) -> "KernelWeight":
        """The same weight on another device."""
        return replace(self, **{name: t.to(device) for name, t in tensors_of(self).items()})


def tensors_of(weight: Any) -> dict[str, Tensor]:
    """The tensors among a dataclass's fields, by name."""
    values = {field.name: getattr(weight, field.name) for field in fields(weight)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def block_columns(bits: int) -> int:
    """Inputs in one block of the kernel layout: 64, 128, 256, 256 for 8, 4, 3, 2 bits."""
    return ROWS * (32 // word_bits(bits))


def word_bits(bits: int) -> int:
    """Bits of a code that lie in `words`: all, or 2 of 3."""
    return 2 if bits == 3 else bits


# ---- files --------------------------------------------------------------------------------------


def read_compressed_tensors(
    tensors: Mapping[str, Tensor], bits: int, group_size: int | None, name: str = "weight"
) -> Codes:
    """Codes of `weight_packed`, `weight_scale`, `weight_shape` and, if any, `weight_zero_point`.

    Raises ValueError, naming the module `name`, for a tensor that is missing or of the wrong shape,
    a width other than 2 to 8, and a group size that is no multiple of 16. Kernels run 5, 6 and 7
    bits after `with_bits(codes, 8)`.
    """
    _check_scheme(bits, group_size, name, FILE_WIDTHS)
    packed, scale = _take(tensors, "weight_packed", name), _take(tensors, "weight_scale", name)
    N, K = _take(tensors, "weight_shape", name).tolist()
    G = _groups(K, group_size)
    _check_shape(packed, (N, packed_columns(K, bits)), f"{name}.weight_packed")
    _check_shape(scale, (N, G), f"{name}.weight_scale")
    zero = tensors.get("weight_zero_point")
    if zero is not None:
        _check_shape(zero, (packed_columns(N, bits), G), f"{name}.weight_zero_point")
        zero = unpack_rows(zero.T.contiguous(), bits, N).T.contiguous()
    return Codes(unpack_rows(packed, bits, K), scale, zero, bits, group_size)


def write_compressed_tensors(weight: Codes) -> dict[str, Tensor]:
    """The inverse of `read_compressed_tensors`. Raises ValueError for permuted inputs."""
    if weight.order is not None:
        raise ValueError("compressed-tensors has no place for permuted inputs (act-order)")
    tensors = {
        "weight_packed": pack_rows(weight.codes, weight.bits),
        "weight_scale": weight.scale,
        "weight_shape": torch.tensor(weight.codes.shape),
    }
    if weight.zero is not None:
        packed = pack_rows(weight.zero.T.contiguous(), weight.bits)
        tensors["weight_zero_point"] = packed.T.contiguous()
    return tensors


def read_gptq(
    tensors: Mapping[str, Tensor],
    bits: int,
    group_size: int | None,
    version: int = 1,
    name: str = "weight",
) -> Codes:
    """Codes of `qweight`, `qzeros`, `scales` and, if it is there, `g_idx`.

    Version 1 stores zero points less one; a stored 2^bits - 1 is then taken to have been 0, as
    GPTQModel does. Columns permuted by act-order are sorted by group. Zero points that are all
    2^(bits-1) are dropped. Raises ValueError as `read_compressed_tensors` does, and for 5 to 7
    bits, which readers of this format store in ways of their own.
    """
    _check_scheme(bits, group_size, name)
    if version not in (1, 2):
        raise ValueError(f"{name}: GPTQ has versions 1 and 2, found {version}")
    qweight, qzeros = _take(tensors, "qweight", name), _take(tensors, "qzeros", name)
    scales = _take(tensors, "scales", name)
    g_idx = tensors.get("g_idx")
    K = len(g_idx) if g_idx is not None else len(qweight) * 32 // bits
    G, N = _groups(K, group_size), qweight.shape[-1]
    _check_shape(qweight, (packed_columns(K, bits), N), f"{name}.qweight")
    _check_shape(scales, (G, N), f"{name}.scales")
    _check_shape(qzeros, (G, packed_columns(N, bits)), f"{name}.qzeros")

    codes = unpack_rows(qweight.T.contiguous(), bits, K)
    order = None if g_idx is None else _group_order(g_idx, group_size, name)
    if order is not None:
        codes = codes[:, order]
    zero = unpack_rows(qzeros, bits, N).to(torch.int16) + int(version == 1)
    zero = (zero % 2**bits).to(torch.uint8).T.contiguous()
    symmetric = bool((zero == 2 ** (bits - 1)).all())
    return Codes(codes, scales.T.contiguous(), None if symmetric else zero, bits, group_size, order)


def write_gptq(weight: Codes, version: int = 1) -> dict[str, Tensor]:
    """The inverse of `read_gptq`, with `g_idx`."""
    N, K = weight.codes.shape
    G, bits = weight.scale.shape[1], weight.bits
    size = K if weight.group_size is None else weight.group_size
    g_idx = (torch.arange(K, device=weight.codes.device) // size).to(torch.int32)
    codes = weight.codes
    if weight.order is not None:
        back = weight.order.argsort()
        codes, g_idx = codes[:, back], g_idx[back]
    zero = weight.zero
    if zero is None:
        zero = torch.full((N, G), 2 ** (bits - 1), dtype=torch.uint8, device=codes.device)
    stored = (zero.to(torch.int16) - int(version == 1)) % 2**bits
    return {
        "qweight": pack_rows(codes, bits).T.contiguous(),
        "qzeros": pack_rows(stored.T.contiguous(), bits),
        "scales": weight.scale.T.contiguous(),
        "g_idx": g_idx,
    }


def with_bits(weight: Codes, bits: int) -> Codes:
    """The same weight in codes of another width: kernels run 5, 6 and 7 bits as 8.

    Codes and zero points move together, so that the middle of one range becomes that of the other:
    (c + d) - (z + d) = c - z is exact, and 2^(bits-1) stays the zero point of a symmetric weight.
    Raises ValueError if a code or a zero point does not fit.
    """
    shift = 2 ** (bits - 1) - 2 ** (weight.bits - 1)

    def moved(codes: Tensor) -> Tensor:
        wide = codes.to(torch.int16) + shift
        if wide.numel() and not (wide.min() >= 0 and wide.max() < 2**bits):
            raise ValueError(f"codes of {weight.bits} bits do not fit {bits}")
        return wide.to(torch.uint8)

    zero = None if weight.zero is None else moved(weight.zero)
    return replace(weight, codes=moved(weight.codes), zero=zero, bits=bits)


def concatenate(weights: Sequence[Codes]) -> Codes:
    """Several weights of the same input as one, outputs after each other: one launch for q, k, v.

    A symmetric weight beside an asymmetric one gets its zero points written out. Raises ValueError
    if widths, group sizes, inputs or their orders differ.
    """
    first = weights[0]
    for other in weights[1:]:
        same = (first.bits, first.group_size, first.codes.shape[1]) == (
            other.bits, other.group_size, other.codes.shape[1],
        )  # fmt: skip
        orders = [w.order for w in (first, other) if w.order is not None]
        if not same or len(orders) == 1 or (orders and not torch.equal(*orders)):
            raise ValueError(
                f"one launch takes weights of the same width, group size, inputs and input order: "
                f"expected {first.bits} bits, groups of {first.group_size}, "
                f"{first.codes.shape[1]} inputs, found {other.bits} bits, groups of "
                f"{other.group_size}, {other.codes.shape[1]} inputs"
            )
    zero = None
    if any(weight.zero is not None for weight in weights):
        middle = 2 ** (first.bits - 1)
        zero = torch.cat(
            [
                torch.full(w.scale.shape, middle, dtype=torch.uint8, device=w.scale.device)
                if w.zero is None
                else w.zero
                for w in weights
            ]
        )
    codes, scale = (torch.cat([getattr(w, name) for w in weights]) for name in ("codes", "scale"))
    return replace(first, codes=codes, scale=scale, zero=zero)


# ---- the kernel layout --------------------------------------------------------------------------


def pack_kernel(weight: Codes) -> KernelWeight:
    """The kernel layout of a weight, on the device that holds it."""
    _check_scheme(weight.bits, weight.group_size, "weight")
    codes, bits = weight.codes, weight.bits
    N, K = codes.shape
    part, size = word_bits(bits), block_columns(bits)
    blocks = -(-K // size)
    planes = torch.nn.functional.pad(codes, (0, blocks * size - K)).view(N, blocks, -1, ROWS)

    high = None
    if bits == 3:
        even = -(-blocks // 2)
        thirds = torch.nn.functional.pad(planes >> 2, (0, 0, 0, 0, 0, 2 * even - blocks))
        # [N, half, parity, plane, ROWS] -> [N, half, plane, parity, ROWS]: bit 2 * plane + parity
        bit_planes = thirds.view(N, even, 2, -1, ROWS).transpose(2, 3).reshape(N, even, -1, ROWS)
        high = _gather_words(bit_planes, 1)
    return KernelWeight(
        words=_gather_words(planes & (2**part - 1), part),
        high=high,
        scale=weight.scale.T.contiguous(),
        zero=None if weight.zero is None else weight.zero.T.contiguous(),
        bits=bits,
        group_size=weight.group_size,
        columns=K,
        order=weight.order,
    )


def unpack_kernel(weight: KernelWeight) -> Codes:
    """The inverse of `pack_kernel`."""
    N, K = weight.shape
    part = word_bits(weight.bits)
    planes = _scatter_words(weight.words, part)  # [N, blocks, E, ROWS]
    if weight.high is not None:
        blocks, E = planes.shape[1:3]
        thirds = _scatter_words(weight.high, 1).view(N, -1, E, 2, ROWS).transpose(2, 3)
        planes = planes | thirds.reshape(N, -1, E, ROWS)[:, :blocks] << 2
    return Codes(
        codes=planes.reshape(N, -1)[:, :K].contiguous(),
        scale=weight.scale.T.contiguous(),
        zero=None if weight.zero is None else weight.zero.T.contiguous(),
        bits=weight.bits,
        group_size=weight.group_size,
        order=weight.order,
    )


def _gather_words(planes: Tensor, bits: int) -> Tensor:
    """uint8 [N, blocks, E, ROWS], plane j at bits [bits*j, ...), -> int32 [blocks * ROWS, N]."""
    words = torch.zeros_like(planes[:, :, 0], dtype=torch.int64)
    for j in range(planes.shape[2]):
        words |= planes[:, :, j].to(torch.int64) << (bits * j)
    low = words.view(torch.int32)[..., ::2]  # the low half: a cast of 2^31 or more is undefined
    return low.reshape(len(planes), -1).T.contiguous()


def _scatter_words(words: Tensor, bits: int) -> Tensor:
    """The inverse of `_gather_words`: uint8 [N, blocks, 32 // bits, ROWS]."""
    slots = words.T.reshape(words.shape[1], -1, 1, ROWS)
    shifts = torch.arange(0, 32, bits, device=words.device, dtype=torch.int32)[:, None]
    return ((slots >> shifts) & (2**bits - 1)).to(torch.uint8)


# ---- checks -------------------------------------------------------------------------------------


def _groups(columns: int, group_size: int | None) -> int:
    return 1 if group_size is None else -(-columns // group_size)


def _group_order(g_idx: Tensor, group_size: int | None, name: str) -> Tensor | None:
    """The inputs sorted by group, or None if they are in that order."""
    size = len(g_idx) if group_size is None else group_size
    runs = torch.arange(len(g_idx), device=g_idx.device) // size
    if torch.equal(g_idx.long(), runs):
        return None
    order = g_idx.argsort(stable=True)
    if not torch.equal(g_idx[order].long(), runs):
        raise ValueError(
            f"{name}.g_idx: expected groups of {size} inputs each, found "
            f"{g_idx.bincount().tolist()[:8]}... inputs in the first groups"
        )
    return order


def _check_scheme(
    bits: int, group_size: int | None, name: str, widths: Container[int] = WIDTHS
) -> None:
    if bits not in widths:
        expected = "2, 3, 4 and 8" if widths == WIDTHS else "2 to 8"
        raise ValueError(f"{name}: expected {expected} bits, found {bits}: load it unpacked")
    if group_size is not None and (group_size <= 0 or group_size % ROWS):
        raise ValueError(
            f"{name}: kernels take groups of a multiple of {ROWS} inputs, or one per output (None),"
            f" found {group_size}: load it unpacked"
        )


def _take(tensors: Mapping[str, Tensor], key: str, name: str) -> Tensor:
    if key not in tensors:
        raise ValueError(f"{name}: expected a tensor {key}, found {', '.join(sorted(tensors))}")
    return tensors[key]


def _check_shape(tensor: Tensor, expected: tuple[int, ...], what: str) -> None:
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{what}: expected {list(expected)}, found {list(tensor.shape)}")
