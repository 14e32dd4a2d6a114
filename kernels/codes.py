"""A quantised weight as codes, one byte each: between checkpoint files and the layouts of kernels.

    file tensors  <->  Codes  <->  KernelWeight (gpu/layout.py), CpuWeight (cpu/weight.py)

A weight of N outputs and K inputs is w = (c - z) * s, with unsigned codes c of b bits, one scale s
and zero point z for each output and each group of `group_size` inputs. A symmetric weight,
z = 2^(b-1) everywhere, has no zero tensor. Every step is exact both ways.

Files: compressed-tensors `pack-quantized` and GPTQ in versions 1 and 2 (packing.py says how the
bits lie). Act-order permutes inputs: they are sorted by group, and `order` says which input each
column takes.

    weight = read_compressed_tensors(tensors, bits=3, group_size=128)
"""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor

from compress.kernels.packing import WIDTHS as FILE_WIDTHS
from compress.kernels.packing import pack_rows, packed_columns, unpack_rows

WIDTHS = (2, 3, 4, 8)
LEAST_GROUP = 16  # the least depth of a tensor-core product: groups are multiples of it
LONGEST = 1 << 16  # inputs of a group of integer products: 2^15 * LONGEST is what an int32 holds
LARGEST_POWER = 1 << 15  # of butterflies: one program of a GPU holds them in registers


@dataclass(frozen=True)
class TensorRecord:
    """A frozen dataclass of tensors, any of which may be None, and facts about them."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in tensors_of(self).values())

    def to(self, device: torch.device | str) -> Self:
        """The same record with its tensors on another device."""
        return replace(self, **{name: t.to(device) for name, t in tensors_of(self).items()})


@dataclass(frozen=True)
class Codes(TensorRecord):
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


def tensors_of(weight: TensorRecord) -> dict[str, Tensor]:
    """The tensors among a dataclass's fields, by name; those that are None are left out."""
    values = {field.name: getattr(weight, field.name) for field in fields(weight)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


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
    check_scheme(bits, group_size, name, FILE_WIDTHS)
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
    check_scheme(bits, group_size, name)
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
    facts = (first.bits, first.group_size, first.codes.shape[1])
    for other in weights[1:]:
        same = facts == (other.bits, other.group_size, other.codes.shape[1])
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


# ---- checks -------------------------------------------------------------------------------------


def group_count(columns: int, group_size: int | None) -> int:
    """Counts the groups G of one output, which has a scale for each."""
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


def butterfly_size(n: int, factors: tuple[Tensor, ...]) -> int:
    """The power of two that Hadamard factors [f, f] leave of n, for butterflies to transform.

    Raises ValueError where the orders do not divide n, leave no power of two, or leave one above
    2^15.
    """
    orders = [len(factor) for factor in factors]
    power = n
    for order in orders:
        power = power // order if power % order == 0 else 0
    if power < 1 or power & (power - 1) or power > LARGEST_POWER:
        raise ValueError(
            f"a transform of size {n} expected factors that leave a power of two up to "
            f"{LARGEST_POWER}, found orders {orders}"
        )
    return power


def check_scheme(
    bits: int, group_size: int | None, name: str, widths: Container[int] = WIDTHS
) -> None:
    """Refuses a width that is none of `widths`, and groups that are no multiple of 16 inputs.

    Raises ValueError, naming the module `name`.
    """
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
