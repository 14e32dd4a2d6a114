"""A quantised weight as codes, one byte each: between checkpoint files and the layouts of kernels.

    file tensors  <->  Codes  <->  KernelWeight (gpu/layout.py), CpuWeight (cpu/weight.py)

A weight of N outputs and K inputs is w = (c - z) * s, with unsigned codes c of b bits, one scale s
and zero point z for each output and each group of `group_size` inputs. A symmetric weight,
z = 2^(b-1) everywhere, has no zero tensor. Act-order permutes inputs: they are sorted by group, and
`order` says which input each column takes.

    weight = Codes(codes, scale, None, bits=3, group_size=128)
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor

WIDTHS = (2, 3, 4, 8)
LEAST_GROUP = 8  # inputs; groups are multiples of it: for each a kernel has a product of its own
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

    def zero_points(self) -> Tensor:
        """The zero points uint8 [N, G], written out where the weight is symmetric."""
        if self.zero is not None:
            return self.zero
        return torch.full_like(self.scale, 2 ** (self.bits - 1), dtype=torch.uint8)


def tensors_of(weight: TensorRecord) -> dict[str, Tensor]:
    """The tensors among a dataclass's fields, by name; those that are None are left out."""
    values = {field.name: getattr(weight, field.name) for field in fields(weight)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


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
        zero = torch.cat([weight.zero_points() for weight in weights])
    codes, scale = (torch.cat([getattr(w, name) for w in weights]) for name in ("codes", "scale"))
    return replace(first, codes=codes, scale=scale, zero=zero)


# ---- checks -------------------------------------------------------------------------------------


def group_count(columns: int, group_size: int | None) -> int:
    """Counts the groups G of one output, which has a scale for each."""
    return 1 if group_size is None else -(-columns // group_size)


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


def check_scheme(bits: int, group_size: int | None, name: str) -> None:
    """Refuses a width that kernels do not run, and groups that are no multiple of 8 inputs.

    Raises ValueError, naming the module `name`.
    """
    if bits not in WIDTHS:
        raise ValueError(f"{name}: expected 2, 3, 4 and 8 bits, found {bits}: load it unpacked")
    if group_size is not None and (group_size <= 0 or group_size % LEAST_GROUP):
        raise ValueError(
            f"{name}: kernels take groups of a multiple of {LEAST_GROUP} inputs, or one per output "
            f"(None), found {group_size}: load it unpacked"
        )
