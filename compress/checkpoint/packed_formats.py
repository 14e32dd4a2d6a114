"""The formats of packed linears: their tensors, the shapes of these, and codes from them and back.

pack-quantized   compressed-tensors, codes in 32-bit words, 2 to 8 bits
int-quantized    compressed-tensors, codes in int8, 2 to 8 bits
gptq, gptq_v2    codes in 32-bit words along the inputs, 2, 3, 4 and 8 bits

Shapes below are of a linear [N, K] of b bits in G groups of inputs (G = 1 for one scale an output);
`kernels.packing` says how codes lie in words. Every step is exact both ways.

    codes = codes_of_signed(q, scale, None, Scheme(4, 128))
    tensors = FORMATS["gptq"].write(codes, Scheme(4, 128))
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from compress.kernels.codes import WIDTHS, Codes, group_count
from compress.kernels.packing import WIDTHS as FILE_WIDTHS
from compress.kernels.packing import pack_rows, packed_columns, unpack_rows
from compress.scheme import PlannedModule, Scheme

Shapes = dict[str, tuple[int, ...]]


class PackedFormat(ABC):
    """One format.

    main: the tensor that holds the codes, and names what is packed. companions: what may lie beside
    it. g_idx: that of them which says each input's group, absent where groups follow each other;
    scale, zero: those that hold scales and zero points.
    """

    main: str
    companions: tuple[str, ...]
    scale: str
    zero: str
    g_idx: str
    widths: tuple[int, ...]

    @property
    def suffixes(self) -> tuple[str, ...]:
        """All tensors that a linear may have."""
        return (self.main, *self.companions)

    @abstractmethod
    def shapes(self, scheme: Scheme, shape: tuple[int, int]) -> Shapes:
        """The tensors that a linear of `shape` [N, K] consists of."""

    @abstractmethod
    def read(self, tensors: Mapping[str, Tensor], scheme: Scheme, name: str) -> Codes:
        """The codes of tensors that have those shapes.

        Raises ValueError, naming the linear `name`, for integers that its width does not hold, and
        for groups of inputs that do not exist or are not of the right size.
        """

    @abstractmethod
    def write(self, codes: Codes, scheme: Scheme) -> dict[str, Tensor]:
        """The inverse of `read`."""


class CompressedTensors(PackedFormat):
    """What both formats of compressed-tensors have in common.

        weight_scale   [N, G]  float   weight = (code - zero point) * scale
        weight_g_idx   [K]     int32   the group of each input, where act-order permutes them

    Codes and zero points are signed, in [-2^(b-1), 2^(b-1) - 1]; only asymmetric linears have zero
    points. One scale for a whole weight, [1], is held as the same scale for every output, since
    kernels know no other; its zero point is an int8.
    """

    g_idx = "weight_g_idx"
    scale, zero = "weight_scale", "weight_zero_point"
    widths = tuple(FILE_WIDTHS)
    stored: torch.dtype  # of integers that hold codes or zero points

    @abstractmethod
    def stored_columns(self, columns: int, bits: int) -> int:
        """How many integers the file holds for so many codes of a row."""

    @abstractmethod
    def decode(self, stored: Tensor, bits: int, columns: int, what: str) -> Tensor:
        """Rows of the file as rows of so many codes, uint8."""

    @abstractmethod
    def encode(self, codes: Tensor, bits: int) -> Tensor:
        """The inverse of `decode`."""

    def shapes(self, scheme: Scheme, shape: tuple[int, int]) -> Shapes:
        (N, K), bits = shape, scheme.bits
        G = group_count(K, scheme.group_size)
        shapes: Shapes = {
            self.main: (N, self.stored_columns(K, bits)),
            "weight_scale": (1,) if scheme.per_tensor else (N, G),
            "weight_g_idx": (K,),
        }
        if "weight_shape" in self.companions:
            shapes["weight_shape"] = (2,)
        if not scheme.symmetric:
            zeros = (1,) if scheme.per_tensor else (self.stored_columns(N, bits), G)
            shapes["weight_zero_point"] = zeros
        return shapes

    def written_shapes(self, scheme: Scheme, shape: tuple[int, int]) -> Shapes:
        """The tensors that `write` gives for a linear whose inputs no act-order permutes."""
        shapes = self.shapes(scheme, shape)
        del shapes[self.g_idx]
        return shapes

    def read(self, tensors: Mapping[str, Tensor], scheme: Scheme, name: str) -> Codes:
        bits, stored = scheme.bits, tensors[self.main]
        K = int(tensors["weight_shape"][1]) if "weight_shape" in tensors else stored.shape[1]
        codes = self.decode(stored, bits, K, f"{name}.{self.main}")
        N, scale, zero = len(codes), tensors["weight_scale"], tensors.get("weight_zero_point")
        zero_name = f"{name}.weight_zero_point"
        if scheme.per_tensor:
            scale = scale.reshape(1, 1).repeat(N, 1)
            if zero is not None:
                zero = _unsigned(zero, bits, zero_name).reshape(1, 1).repeat(N, 1)
        elif zero is not None:
            zero = self.decode(zero.T.contiguous(), bits, N, zero_name).T.contiguous()
        weight = Codes(codes, scale, zero, bits, scheme.group_size)
        g_idx = tensors.get(self.g_idx)
        # -1 everywhere is how compressed-tensors fills it in where groups follow each other
        if g_idx is None or (len(g_idx) and bool((g_idx == -1).all())):
            return weight
        return _sorted_inputs(weight, g_idx, f"{name}.{self.g_idx}")

    def write(self, codes: Codes, scheme: Scheme) -> dict[str, Tensor]:
        scale, zero, bits = codes.scale, codes.zero, codes.bits
        inputs, g_idx = _unsorted_inputs(codes)
        tensors = {
            self.main: self.encode(inputs, bits),
            "weight_scale": scale[:1].reshape(1) if scheme.per_tensor else scale.contiguous(),
        }
        if "weight_shape" in self.companions:
            tensors["weight_shape"] = torch.tensor(inputs.shape)
        if zero is not None and scheme.per_tensor:
            tensors["weight_zero_point"] = _signed(zero[:1].reshape(1), bits)
        elif zero is not None:
            tensors["weight_zero_point"] = self.encode(zero.T.contiguous(), bits).T.contiguous()
        if codes.order is not None:
            tensors[self.g_idx] = g_idx
        return tensors


class PackQuantized(CompressedTensors):
    """Codes in words.

    weight_packed      [N, ceil(K*b/32)]  int32   codes + 2^(b-1), packed along K
    weight_zero_point  [ceil(N*b/32), G]  int32   packed like codes, along N
    weight_shape       [2]                int64   N, K
    """

    main = "weight_packed"
    companions = ("weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
    stored = torch.int32

    def stored_columns(self, columns: int, bits: int) -> int:
        return packed_columns(columns, bits)

    def decode(self, stored: Tensor, bits: int, columns: int, what: str) -> Tensor:
        return unpack_rows(stored, bits, columns)

    def encode(self, codes: Tensor, bits: int) -> Tensor:
        return pack_rows(codes, bits)


class IntQuantized(CompressedTensors):
    """Codes as they are.

    weight             [N, K]  int8
    weight_zero_point  [N, G]  int8
    """

    main = "weight"
    companions = ("weight_scale", "weight_zero_point", "weight_g_idx")
    stored = torch.int8

    def stored_columns(self, columns: int, bits: int) -> int:
        return columns

    def decode(self, stored: Tensor, bits: int, columns: int, what: str) -> Tensor:
        return _unsigned(stored, bits, what)

    def encode(self, codes: Tensor, bits: int) -> Tensor:
        return _signed(codes, bits)


class Gptq(PackedFormat):
    """GPTQ: the streams of pack-quantized, transposed, with unsigned codes and zero points.

        qweight  [ceil(K*b/32), N]  int32  codes, packed along K
        qzeros   [G, ceil(N*b/32)]  int32  zero points, packed along N
        scales   [G, N]             fp16   weight = (code - zero point) * scale; may be negative
        g_idx    [K]                int32  the group of each input

    Version 1 (`gptq`) stores zero points less one; a stored 2^b - 1 is then taken to have been 0,
    as GPTQModel does. Version 2 (`gptq_v2`) stores them as they are. 5, 6 and 7 bits have no layout
    that more than one reader knows.
    """

    main = "qweight"
    companions = ("qzeros", "scales", "g_idx")
    g_idx = "g_idx"
    scale, zero = "scales", "qzeros"
    widths = WIDTHS

    def __init__(self, version: int):
        self.less = int(version == 1)

    def shapes(self, scheme: Scheme, shape: tuple[int, int]) -> Shapes:
        (N, K), G = shape, group_count(shape[1], scheme.group_size)
        return {
            "qweight": (packed_columns(K, scheme.bits), N),
            "qzeros": (G, packed_columns(N, scheme.bits)),
            "scales": (G, N),
            "g_idx": (K,),
        }

    def read(self, tensors: Mapping[str, Tensor], scheme: Scheme, name: str) -> Codes:
        bits, qweight, g_idx = scheme.bits, tensors["qweight"], tensors.get("g_idx")
        K = len(qweight) * 32 // bits if g_idx is None else len(g_idx)
        zero = unpack_rows(tensors["qzeros"], bits, qweight.shape[1]).to(torch.int16) + self.less
        zero = (zero % 2**bits).to(torch.uint8).T.contiguous()
        symmetric = bool((zero == 2 ** (bits - 1)).all())
        codes = unpack_rows(qweight.T.contiguous(), bits, K)
        scale = tensors["scales"].T.contiguous()
        weight = Codes(codes, scale, None if symmetric else zero, bits, scheme.group_size)
        return weight if g_idx is None else _sorted_inputs(weight, g_idx, f"{name}.g_idx")

    def write(self, codes: Codes, scheme: Scheme) -> dict[str, Tensor]:
        bits = codes.bits
        inputs, g_idx = _unsorted_inputs(codes)
        zero = (codes.zero_points().to(torch.int16) - self.less) % 2**bits
        return {
            "qweight": pack_rows(inputs, bits).T.contiguous(),
            "qzeros": pack_rows(zero.T.contiguous(), bits),
            "scales": codes.scale.T.contiguous(),
            "g_idx": g_idx,
        }


WRITTEN: dict[str, CompressedTensors] = {  # by runs
    "pack-quantized": PackQuantized(),
    "int-quantized": IntQuantized(),
}
FORMATS: dict[str, PackedFormat] = {
    **WRITTEN,
    "gptq": Gptq(version=1),
    "gptq_v2": Gptq(version=2),
}


def planned_tensors(
    modules: Iterable[PlannedModule], scale: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The tensors that a run writes for these modules, by their full names: dtype and shape."""
    tensors = {}
    for module in modules:
        format = WRITTEN[module.format]
        dtypes = {"weight_scale": scale, "weight_shape": torch.int64}
        for key, shape in format.written_shapes(module.scheme, module.shape).items():
            if module.twin is None or key != format.main:
                tensors[f"{module.name}.{key}"] = dtypes.get(key, format.stored), shape
    return tensors


def planned_bytes(modules: Iterable[PlannedModule], scale: torch.dtype) -> dict[str, int]:
    """The same: bytes of each tensor."""
    tensors = planned_tensors(modules, scale)
    return {name: dtype.itemsize * math.prod(shape) for name, (dtype, shape) in tensors.items()}


# ---- codes --------------------------------------------------------------------------------------


def codes_of_signed(codes: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme) -> Codes:
    """The codes of signed integers [N, K], as solvers give them; scale and zero point [N, G].

    Raises ValueError if there is not one scale for each row and group, or if an integer does not
    fit the width of the scheme.
    """
    (N, K), G = codes.shape, group_count(codes.shape[1], scheme.group_size)
    if scale.shape != (N, G) or (zero is not None and zero.shape != (N, G)):
        found = f"scale {list(scale.shape)}"
        found += "" if zero is None else f" and zero point {list(zero.shape)}"
        raise ValueError(f"codes [{N}, {K}] take one scale per row and group, {G}; found {found}")
    return Codes(
        _unsigned(codes, scheme.bits, "weight"),
        scale,
        None if zero is None else _unsigned(zero, scheme.bits, "zero point"),
        scheme.bits,
        scheme.group_size,
    )


def with_fp16_scales(weight: Codes) -> Codes:
    """The weight as other formats hold it: scales rounded to fp16.

    Scales beyond fp16, which only groups of zeros may have, become 0. Codes whose scale becomes 0
    become the zero point: a scale of 0 stands for zeros alone.
    """
    scale = weight.scale.half()
    scale = torch.where(torch.isfinite(scale), scale, 0)
    codes, none = weight.codes, scale == 0
    if bool(none.any()):
        codes = torch.where(
            by_input(none, weight), by_input(weight.zero_points(), weight), weight.codes
        )
    return replace(weight, scale=scale, codes=codes)


def by_input(grouped: Tensor, weight: Codes) -> Tensor:
    """What the weight has for each group, [N, G], for each input: [N, K]."""
    K = weight.codes.shape[1]
    size = K if weight.group_size is None else weight.group_size
    return grouped[:, torch.arange(K, device=grouped.device) // size]


def _unsigned(integers: Tensor, bits: int, what: str) -> Tensor:
    """Signed integers as codes: c = q + 2^(b-1), and zero points likewise."""
    half = 2 ** (bits - 1)
    if integers.numel():
        low, high = map(int, integers.aminmax())
        if not (low >= -half and high < half):
            raise ValueError(f"{what} holds integers of more than {bits} bits")
    return integers.to(torch.int8).view(torch.uint8) + half  # modulo 256, as bytes are


def _signed(codes: Tensor, bits: int) -> Tensor:
    return (codes - 2 ** (bits - 1)).view(torch.int8)


def _sorted_inputs(weight: Codes, g_idx: Tensor, what: str) -> Codes:
    """The weight of which g_idx [K] says each input's group, its inputs sorted by group.

    It has no `order` if they were sorted already. Raises ValueError, naming the tensor as `what`,
    for groups that do not exist or are not of the right size: no kernel runs those.
    """
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


def _unsorted_inputs(weight: Codes) -> tuple[Tensor, Tensor]:
    """The inverse of `_sorted_inputs`: codes [N, K] in the order of the inputs, and g_idx [K]."""
    K = weight.codes.shape[1]
    size = K if weight.group_size is None else weight.group_size
    g_idx = (torch.arange(K, device=weight.codes.device) // size).to(torch.int32)
    if weight.order is None:
        return weight.codes, g_idx
    back = weight.order.argsort()
    return weight.codes[:, back], g_idx[back]
