"""From the layouts of checkpoint files to the layout that kernels read, exact both ways.

    file tensors  <->  Codes (one byte per weight)  <->  KernelWeight (int32 words)

A weight of N outputs and K inputs is w = (c - z) * s, with unsigned codes c of b bits, one scale s
and zero point z for each output and each group of `group_size` inputs. Files: compressed-tensors
`pack-quantized` and GPTQ in versions 1 and 2 (packing.py says how the bits lie).

Kernel layout: what a thread of a tensor-core product multiplies lies in its own words, so that
codes go from memory to the product through registers alone. In a product of 16 x 16 weights, lane
4n + q of a warp holds inputs 2q, 2q + 1, 2q + 8, 2q + 9 of outputs n and n + 8 (PTX ISA, fragments
of mma.m16n8k16 and of wgmma). Inputs are cut into blocks of 16 * E, E = 32 // b codes to a word:

    words [blocks, N, 16] int32:   bits [b*t + 16*e, ...) of words[i, n, 4*q + 2*h + j] are the code
                                   of output n and input (16*i) * E + 32*t + 16*h + 8*j + 2*q + e

with t < E / 2, q < 4 and bits h, j, e. So a thread's share of a block is 16 bytes of each of its
outputs, the outputs of a tile follow each other without gaps, the same shift of a whole tile gives
32 neighbouring inputs, and a mask leaves the codes of two neighbours where a register of two 16-bit
floats has them. 3 bits do not divide a word: they are a plane of 2 bits, laid out as above with
E = 16, and one of 1 bit,

    high  [blocks, N, 8] int32:    bit 4*(t // 2) + 2*j + t % 2 + 16*e of high[i, n, 2*q + h]

which one shift and one mask move to where four bits hold a code.

Columns beyond K are 0 and meet no input. A symmetric weight, z = 2^(b-1) everywhere, has no zero
tensor. Act-order permutes inputs: they are sorted by group, and `order` says which input each
column takes.

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
LEAST_GROUP = 16  # the least depth of a tensor-core product: groups are multiples of it
LONGEST = 1 << 16  # inputs of a group of integer products: 2^15 * LONGEST is what an int32 holds
WORDS = 16  # of an output and a block: 4 lanes have 16 bytes each


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

    scale [G, N] and zero uint8 [G, N].
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
    return WORDS * (32 // word_bits(bits))


def word_bits(bits: int) -> int:
    """Bits of a code that lie in `words`: all, or 2 of 3."""
    return 2 if bits == 3 else bits


# ---- files --------------------------------------------------------------------------------------


def read_compressed_tensors(
    tensors: Mapping[str, Tensor], bits: int, group_size: int | None, name: str = "weight"
) -> Codes:
    """Codes of `weight_packed`, `weight_scale`, `weight_shape` and, if they are there,
    `weight_zero_point` and `weight_g_idx` (`sort_inputs`).

    Raises ValueError, naming the module `name`, for a tensor that is missing or of the wrong shape,
    a width other than 2 to 8, and a group size that is no multiple of 16. Kernels run 5, 6 and 7
    bits after `with_bits(codes, 8)`.
    """
    _check_scheme(bits, group_size, name, FILE_WIDTHS)
    packed, scale = _take(tensors, "weight_packed", name), _take(tensors, "weight_scale", name)
    N, K = _take(tensors, "weight_shape", name).tolist()
    G = group_count(K, group_size)
    _check_shape(packed, (N, packed_columns(K, bits)), f"{name}.weight_packed")
    _check_shape(scale, (N, G), f"{name}.weight_scale")
    zero = tensors.get("weight_zero_point")
    if zero is not None:
        _check_shape(zero, (packed_columns(N, bits), G), f"{name}.weight_zero_point")
        zero = unpack_rows(zero.T.contiguous(), bits, N).T.contiguous()
    weight = Codes(unpack_rows(packed, bits, K), scale, zero, bits, group_size)
    return sort_inputs(weight, tensors.get("weight_g_idx"), f"{name}.weight_g_idx")


def write_compressed_tensors(weight: Codes) -> dict[str, Tensor]:
    """The inverse of `read_compressed_tensors`, with `weight_g_idx` if inputs are permuted."""
    codes, g_idx = unsorted_inputs(weight)
    tensors = {
        "weight_packed": pack_rows(codes, weight.bits),
        "weight_scale": weight.scale,
        "weight_shape": torch.tensor(weight.codes.shape),
    }
    if weight.zero is not None:
        packed = pack_rows(weight.zero.T.contiguous(), weight.bits)
        tensors["weight_zero_point"] = packed.T.contiguous()
    if weight.order is not None:
        tensors["weight_g_idx"] = g_idx
    return tensors


def sort_inputs(weight: Codes, g_idx: Tensor | None, what: str) -> Codes:
    """The weight of which g_idx [K] says each input's group, its inputs sorted by group.

    Without g_idx, and with -1 everywhere as compressed-tensors fills it in, groups follow each
    other. Raises ValueError, naming the tensor as `what`, for groups that do not exist or are not
    of the right size: those are no permutation, and no kernel runs them.
    """
    if g_idx is None or (len(g_idx) and bool((g_idx == -1).all())):
        return weight
    return _sorted(weight, g_idx, what)


def unsorted_inputs(weight: Codes) -> tuple[Tensor, Tensor]:
    """The inverse of `sort_inputs`: codes [N, K] in the order of the inputs, and g_idx [K]."""
    K = weight.codes.shape[1]
    size = K if weight.group_size is None else weight.group_size
    g_idx = (torch.arange(K, device=weight.codes.device) // size).to(torch.int32)
    if weight.order is None:
        return weight.codes, g_idx
    back = weight.order.argsort()
    return weight.codes[:, back], g_idx[back]


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
    G, N = group_count(K, group_size), qweight.shape[-1]
    _check_shape(qweight, (packed_columns(K, bits), N), f"{name}.qweight")
    _check_shape(scales, (G, N), f"{name}.scales")
    _check_shape(qzeros, (G, packed_columns(N, bits)), f"{name}.qzeros")

    zero = unpack_rows(qzeros, bits, N).to(torch.int16) + int(version == 1)
    zero = (zero % 2**bits).to(torch.uint8).T.contiguous()
    symmetric = bool((zero == 2 ** (bits - 1)).all())
    codes = unpack_rows(qweight.T.contiguous(), bits, K)
    weight = Codes(codes, scales.T.contiguous(), None if symmetric else zero, bits, group_size)
    return weight if g_idx is None else _sorted(weight, g_idx, f"{name}.g_idx")


def write_gptq(weight: Codes, version: int = 1) -> dict[str, Tensor]:
    """The inverse of `read_gptq`, with `g_idx`."""
    bits, zero = weight.bits, weight.zero
    codes, g_idx = unsorted_inputs(weight)
    if zero is None:
        zero = torch.full_like(weight.scale, 2 ** (bits - 1), dtype=torch.uint8)
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
    codes = torch.nn.functional.pad(codes, (0, -K % size))
    # [N, blocks, t, h, j, q, e]
    fields = codes.view(N, -1, 16 // part, 2, 2, 4, 2).transpose(0, 1)
    high = None
    if bits == 3:
        # [blocks, N, t // 2, t % 2, h, j, q, e] -> [blocks, N, q, h, e, t // 2, j, t % 2]
        thirds = (fields >> 2).unflatten(2, (4, 2)).permute(0, 1, 6, 4, 7, 2, 5, 3)
        high = _gather_words(thirds.reshape(-1, N, 8, 32), 1)
    low = (fields & (2**part - 1)).permute(0, 1, 5, 3, 4, 6, 2)  # [blocks, N, q, h, j, e, t]
    return KernelWeight(
        words=_gather_words(low.reshape(-1, N, WORDS, 32 // part), part),
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
    blocks = len(weight.words)
    low = _scatter_words(weight.words, part).view(blocks, N, 4, 2, 2, 2, 16 // part)
    fields = low.permute(1, 0, 6, 3, 4, 2, 5)  # [N, blocks, t, h, j, q, e]
    if weight.high is not None:
        thirds = _scatter_words(weight.high, 1).view(blocks, N, 4, 2, 2, 4, 2, 2)
        fields = fields | thirds.permute(1, 0, 5, 7, 3, 6, 2, 4).flatten(2, 3) << 2
    return Codes(
        codes=fields.reshape(N, -1)[:, :K].contiguous(),
        scale=weight.scale.T.contiguous(),
        zero=None if weight.zero is None else weight.zero.T.contiguous(),
        bits=weight.bits,
        group_size=weight.group_size,
        order=weight.order,
    )


def _gather_words(fields: Tensor, bits: int) -> Tensor:
    """uint8 [..., 32 // bits], field i at bits [bits*i, ...), -> int32 [...]."""
    words = torch.zeros_like(fields[..., 0], dtype=torch.int64)
    for i in range(fields.shape[-1]):
        words |= fields[..., i].to(torch.int64) << (bits * i)
    # the low half: a cast of 2^31 or more is undefined
    return words.view(torch.int32)[..., ::2].contiguous()


def _scatter_words(words: Tensor, bits: int) -> Tensor:
    """The inverse of `_gather_words`: uint8 [..., 32 // bits]."""
    shifts = torch.arange(0, 32, bits, device=words.device, dtype=torch.int32)
    return ((words[..., None] >> shifts) & (2**bits - 1)).to(torch.uint8)


# ---- checks -------------------------------------------------------------------------------------


def group_count(columns: int, group_size: int | None) -> int:
    """Scales of one output."""
    return 1 if group_size is None else -(-columns // group_size)


def _sorted(weight: Codes, g_idx: Tensor, what: str) -> Codes:
    """The weight with its inputs sorted by group, and no `order` if they were already."""
    size = len(g_idx) if weight.group_size is None else weight.group_size
    last = weight.scale.shape[1] - 1
    outside = g_idx[(g_idx < 0) | (g_idx > last)]
    if len(outside):
        raise ValueError(f"{what}: expected groups 0 to {last}, found {outside[0]}")
    runs = torch.arange(len(g_idx), device=g_idx.device) // size
    if torch.equal(g_idx.long(), runs):
        return weight
    order = g_idx.argsort(stable=True)
    if not torch.equal(g_idx[order].long(), runs):
        raise ValueError(
            f"{what}: expected groups of {size} inputs each, found "
            f"{g_idx.bincount().tolist()[:8]}... inputs in the first groups"
        )
    return replace(weight, codes=weight.codes[:, order], order=order)


def check_integer_sums(columns: int, group_size: int | None) -> None:
    """Raises ValueError for groups of more than LONGEST inputs, whose products may not fit."""
    inputs = min(group_size or columns, columns)
    if inputs > LONGEST:
        raise ValueError(
            f"sums of integers in int32 take groups of up to {LONGEST} inputs, found {inputs}"
        )


def _check_scheme(
    bits: int, group_size: int | None, name: str, widths: Container[int] = WIDTHS
) -> None:
    if bits not in widths:
        expected = "2, 3, 4 and 8" if widths == WIDTHS else "2 to 8"
        raise ValueError(f"{name}: expected {expected} bits, found {bits}: load it unpacked")
    if group_size is not None and (group_size <= 0 or group_size % LEAST_GROUP):
        raise ValueError(
            f"{name}: kernels take groups of a multiple of {LEAST_GROUP} inputs, or one per output "
            f"(None), found {group_size}: load it unpacked"
        )


def _take(tensors: Mapping[str, Tensor], key: str, name: str) -> Tensor:
    if key not in tensors:
        raise ValueError(f"{name}: expected a tensor {key}, found {', '.join(sorted(tensors))}")
    return tensors[key]


def _check_shape(tensor: Tensor, expected: tuple[int, ...], what: str) -> None:
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{what}: expected {list(expected)}, found {list(tensor.shape)}")
