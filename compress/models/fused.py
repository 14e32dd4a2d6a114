"""Experts that files hold together: two tensors for all those of a layer, and how to part them.

Of most families files have three matrices an expert. GraniteMoE and gpt-oss have a tensor for all
gates and ups and one for all downs; a whole is such a tensor, or that of their biases:

    GraniteMoE    [E, 2 m, d]    gates above ups           [E, d, m]
    gpt-oss       [E, d, 2 m]    gate, up, gate, up, ...   [E, m, d], and biases of the same order
    Qwen3-VL      [E, d, 2 m]    gates left of ups         [E, m, d], or both as GraniteMoE has them

Or, of gpt-oss, in MXFP4: codes of 4 bits (E2M1) with a power of two for each 32 of them, which is
exact in bf16. One expert is read at a time. What stays in 16 bits is written as it was read; what
is quantised has a place for each expert, since that is where engines look for packed weights.

    reader = PartedReader(folder, rename, wholes)
    reader.tensor("model.layers.0.mlp.experts.5.up_proj.weight")     # [m, d]
    whole.join(tensors)                                              # [E, d, 2 m]
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from compress.errors import CheckpointError
from compress.models.experts import OpenedExperts
from compress.models.family_specs import ExpertNames
from compress.storage.safetensors import CheckpointReader, check_finite, read_item
from compress.storage.safetensors_header import DTYPES, TensorEntry

MXFP4 = "mxfp4"  # what config.json calls it
BIAS = ".bias"
SCALED = 32  # codes of MXFP4 that share a scale; two of them lie in a byte
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]  # a sign, two bits of exponent, one of mantissa
E2M1 += [-value for value in E2M1]


@dataclass(frozen=True)
class Whole:
    """A tensor of all experts of a layer.

    Attributes:
        name: what files call it.
        parts: for each expert the tensors that are of it: gate and up, or down alone.
        shape: of one part: [N, K], or [N] for biases.
        names: how files hold experts.
        transposed: whether the file has it as [E, K, N].
    """

    name: str
    parts: tuple[tuple[str, ...], ...]
    shape: tuple[int, ...]
    names: ExpertNames
    transposed: bool

    def inside(self, prefix: str) -> "Whole":
        """The same with something in front of all names."""
        parts = tuple(tuple(prefix + name for name in names) for names in self.parts)
        return replace(self, name=prefix + self.name, parts=parts)

    @property
    def inner(self) -> tuple[int, ...]:
        """The shape of an expert's share, before it is transposed: [2 N, K], [N, K] or [N]."""
        return (len(self.parts[0]) * self.shape[0], *self.shape[1:])

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """The shape in files."""
        inner = self.inner[::-1] if self.transposed else self.inner
        return (len(self.parts), *inner)

    def part(self, share: Tensor, place: int) -> Tensor:
        """One of the parts of an expert's share [2 N, K]: its own memory."""
        return self._rows(share, place).contiguous()

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The whole of all parts, by their names."""
        first = tensors[self.parts[0][0]]
        whole = torch.empty(self.whole_shape, dtype=first.dtype, device=first.device)
        for number, parts in enumerate(self.parts):
            share = whole[number]
            share = share.T if self.transposed and share.ndim > 1 else share
            for place, name in enumerate(parts):
                self._rows(share, place).copy_(tensors[name])
        return whole

    def _rows(self, share: Tensor, place: int) -> Tensor:
        """Where one of the parts lies in an expert's share [2 N, K]."""
        count, N = len(self.parts[0]), self.shape[0]
        rows = slice(place, None, count) if self.names.interleaved else slice(place * N, None)
        return share[rows][:N]


def wholes_of(layer: nn.Module) -> list[Whole]:
    """Those of a decoder layer with opened experts, by their names inside it."""
    found = []
    for place, experts in layer.named_modules():
        if not isinstance(experts, OpenedExperts) or experts.names.files is None:
            continue
        names, block = experts.names, place.rpartition(".")[0]
        for file, linears in zip(experts.names.files, names.fused, strict=True):
            first = experts.expert(0).get_submodule(linears[0])
            for key, parameter in first.named_parameters():
                parts = tuple(
                    tuple(f"{place}.{number}.{linear}.{key}" for linear in linears)
                    for number in range(experts.count)
                )
                name = f"{block}.{file}{'_bias' if key == 'bias' else ''}"
                found.append(
                    Whole(name, parts, tuple(parameter.shape), names, bool(names.transposed))
                )
    return found


def joined(names: Iterable[str], wholes: Iterable[Whole]) -> dict[str, Whole]:
    """What is written for tensors of these names: wholes, where all of their parts are there.

    Biases stay with their weights: they are parted where those are packed.
    """
    there = {*names}

    def complete(name: str) -> bool:
        return name in there and (
            not name.endswith(BIAS) or f"{name[: -len(BIAS)]}.weight" in there
        )

    return {w.name: w for w in wholes if all(complete(n) for part in w.parts for n in part)}


class PartedReader(CheckpointReader):
    """The tensors of a folder, those of fused experts by the names of their parts.

    Raises CheckpointError, as the base class does, and for a whole that is not there or has another
    shape.
    """

    def __init__(self, folder: Path, rename: Callable[[str], str], wholes: Iterable[Whole]):
        super().__init__(folder, rename)
        self._parts: dict[str, tuple[Whole, int, int]] = {}
        self._wholes: dict[str, tuple[TensorEntry, ...]] = {}  # codes and scales, where in MXFP4
        self.wholes = {whole.name: self._as_stored(whole) for whole in wholes}
        for whole in self.wholes.values():
            found = self._found(whole)
            dtype = found[0].dtype if len(found) == 1 else "BF16"
            size = math.prod(whole.shape) * DTYPES[dtype].itemsize
            entry = replace(found[0], dtype=dtype, shape=whole.shape, nbytes=size)
            self._wholes[whole.name] = found
            for number, parts in enumerate(whole.parts):
                for place, name in enumerate(parts):
                    self._parts[name] = whole, number, place
                    self._entries[name], self._written[name] = entry, whole.name

    def tensor(self, name: str) -> Tensor:
        """Reads one tensor into memory of its own; of a fused expert no more than its share."""
        if name not in self._parts:
            return super().tensor(name)
        whole, number, place = self._parts[name]
        shares = [read_item(whole.name, entry, number) for entry in self._wholes[whole.name]]
        if len(shares) == 2:
            share = from_mxfp4(*shares)
        else:
            share = shares[0].T if whole.transposed and len(whole.shape) > 1 else shares[0]
            check_finite(share, whole.name, self.entry(name).file)
        return whole.part(share, place)

    def _as_stored(self, whole: Whole) -> Whole:
        """A whole the way that the file has it, where both ways are known; as transformers does,
        straight where the shape does not say."""
        turned = replace(whole, transposed=True)
        known = whole.names.transposed is not None or whole.name not in self
        if known or self.shape(whole.name) == whole.whole_shape:
            return whole
        return turned if self.shape(whole.name) == turned.whole_shape else whole

    def _found(self, whole: Whole) -> tuple[TensorEntry, ...]:
        """Where a whole lies, which then goes by its parts alone; CheckpointError if nowhere."""
        blocks = (f"{whole.name}_blocks", f"{whole.name}_scales")
        names = blocks if blocks[0] in self and len(whole.shape) > 1 else (whole.name,)
        for name in names:
            if name not in self:
                raise CheckpointError(f"{self.folder} lacks the tensor {name!r}")
        expected: list[tuple[tuple[int, ...], str | None]]
        if names == blocks:
            *rows, K = len(whole.parts), *whole.inner
            groups = (*rows, K // SCALED)
            expected = [((*groups, SCALED // 2), "U8"), (groups, "U8")]
        else:
            expected = [(whole.whole_shape, None)]
        for name, (shape, dtype) in zip(names, expected, strict=True):
            entry = self.entry(name)
            if entry.shape != shape or (dtype or entry.dtype) != entry.dtype:
                raise CheckpointError(
                    f"tensor {name!r} in {self.folder} has shape {entry.shape} and dtype "
                    f"{entry.dtype}, expected {shape} from config.json"
                    + (f" and {dtype}" if dtype else "")
                )
            if dtype is None and entry.dtype not in DTYPES:
                raise CheckpointError(f"tensor {name!r} in {entry.file} has dtype {entry.dtype}")
        found = tuple(self._entries.pop(name) for name in names)
        for name in names:
            self._written.pop(name, None)
        return found


def from_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Weights [N, K] in bf16 of codes [N, K / 32, 16], two in a byte, and exponents [N, K / 32].

    The low half of a byte comes first; an exponent is a power of two, 127 more than it is.
    """
    values = torch.tensor(E2M1, dtype=torch.bfloat16)
    codes = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2)  # [N, K / 32, 32]
    powers = scales.to(torch.int32)[..., None] - 127
    return torch.ldexp(values[codes.int()], powers).flatten(1)
