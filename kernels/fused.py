"""Several packed linears of the same input as one: q, k and v, or gate and up, in one launch.

A linear that was fused stays where it was, and answers with its slice of the shared product, which
the first of them computes and the others find. They find it only for the very same tensor,
unchanged since; for any other input it is computed anew, so a module that reads something else
(keys of another sequence) is as right as before, only not faster. torch counts changes in place,
except under `torch.inference_mode`: there, nothing may write to the input between two of them.

    fuse_linears(model, [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")])
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from compress.kernels.codes import Codes, concatenate
from compress.kernels.linear import QuantLinear


def fuse_linears(model: nn.Module, together: Iterable[Sequence[str]]) -> list[str]:
    """Fuses the packed linears of every module of `model` that lie in it under these names.

    Those that differ in width, group size, order or rounding of inputs, or of which only some have
    a bias, stay apart. Returns the names of the modules that hold the shared products.
    """
    fused = []
    for parent_name, parent in list(model.named_modules()):
        for names in together:
            found = [getattr(parent, name, None) for name in names]
            parts = [part for part in found if type(part) is QuantLinear]
            if len(parts) < len(found) or (shared := _shared(parts)) is None:
                continue
            name = "fused_" + "_".join(names)
            setattr(parent, name, shared)
            for i, part_name in enumerate(names):
                setattr(parent, part_name, FusedPart(shared, i))
            fused.append(f"{parent_name}.{name}".removeprefix("."))
    return fused


class SharedLinear(nn.Module):
    """One packed linear whose outputs belong to several modules, `sizes` of them to each."""

    def __init__(self, linear: QuantLinear, sizes: Sequence[int]):
        super().__init__()
        self.linear, self.sizes = linear, list(sizes)
        # (input, its version, outputs, who has had theirs), replaced as a whole: two threads that
        # run one model may compute a product twice, and never mix two inputs. Who reads it keeps a
        # name of its own for it: what another thread puts here meanwhile does not concern it.
        self._product: tuple[Tensor, int, tuple[Tensor, ...], set[int]] | None = None

    def part(self, index: int, x: Tensor) -> Tensor:
        """x [..., in_features] -> the outputs [..., sizes[index]] of one module."""
        product = self._product
        version = 0 if x.is_inference() else x._version  # counts changes in place
        if product is None or product[0] is not x or product[1] != version or index in product[3]:
            product = (x, version, self.linear(x).split(self.sizes, -1), set())
        product[3].add(index)
        # the last one lets go of the activations
        self._product = None if len(product[3]) == len(self.sizes) else product
        return product[2][index]

    def codes(self, index: int) -> Codes:
        """The codes of one module, as they came."""
        return self._cut(self.linear.codes(), index)

    def bias(self, index: int) -> Tensor | None:
        """The bias of one module."""
        bias = self.linear.bias
        return None if bias is None else bias.split(self.sizes)[index]

    def _cut(self, weight: Codes, index: int) -> Codes:
        codes, scale = (t.split(self.sizes)[index] for t in (weight.codes, weight.scale))
        zero = None if weight.zero is None else weight.zero.split(self.sizes)[index]
        if zero is not None and (zero == 2 ** (weight.bits - 1)).all():
            zero = None  # written out only for the others
        return Codes(codes, scale, zero, weight.bits, weight.group_size, weight.order)


class FusedPart(nn.Module):
    """A linear whose weight lies in a SharedLinear beside it."""

    def __init__(self, shared: SharedLinear, index: int):
        super().__init__()
        self._shared = (shared, index)  # in a tuple, so that it is not a child of each part
        self.in_features, self.out_features = shared.linear.in_features, shared.sizes[index]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features], in x's dtype."""
        shared, index = self._shared
        return shared.part(index, x)

    def codes(self) -> Codes:
        """The codes, scales and zero points, as they came."""
        shared, index = self._shared
        return shared.codes(index)

    @property
    def bias(self) -> Tensor | None:
        """The bias [out_features]."""
        shared, index = self._shared
        return shared.bias(index)

    def extra_repr(self) -> str:
        """What print(model) says of this layer."""
        return f"in_features={self.in_features}, out_features={self.out_features}, fused=True"


def _shared(parts: Sequence[QuantLinear]) -> SharedLinear | None:
    """The linear of all parts' outputs; None if they do not go together."""
    if len({(part.bias is None, part.dtype, part.activation_bits) for part in parts}) > 1:
        return None
    try:
        weight = concatenate([part.codes() for part in parts])
    except ValueError:  # they differ, and stay apart
        return None
    biases = [part.bias for part in parts if part.bias is not None]  # all or none
    bias = torch.cat(biases) if biases else None
    linear = QuantLinear(weight, bias, parts[0].dtype, parts[0].activation_bits)
    return SharedLinear(linear, [part.out_features for part in parts])
