"""Takes every calibration token through one decoder layer and quantises its linears on the way.

The layer `x += o(attention(norm(x))); x += down(mlp(norm(x)))` is run in stages. A stage gives the
input of one group of linears, from which the group's Hessian is built; the group is quantised; the
next stage runs through the quantised weights ("true sequential"):

    norm(x)            -> H -> q, k, v
    attention(norm(x)) -> H -> o          x += o(.)
    norm(x)            -> H -> gate, up
    act(gate) * up     -> H -> down       x += down(.)

So no linear sees a token twice (q and k do where token importance looks at their attention map),
where running the whole layer once a group costs five passes. What a stage leaves for after its
group, the input of o or of down, waits in a second store.

A stage's input is what the family's own module computes with its output projection taken out, so
attention and activation functions are never written again here.

    run_layer(layer, spec, inputs, x, y, work, quantise=..., needs_hessian=..., weigh=...)
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from compress.data.activations import ActivationStore
from compress.models.families import ArchitectureSpec
from compress.models.skeleton import LayerInputs, linear_in
from compress.quantization.grid import UniformGrid
from compress.quantization.hessian import Hessian
from compress.quantization.solvers import QuantizedLinear, Solver
from compress.scheme import Scheme

# Quantises the linears of a group, in place in the layer, given the Hessian of their input; the
# Hessian is None where no linear of the group needs one.
QuantiseGroup = Callable[[tuple[str, ...], Hessian | None], None]
# Token weights [B, T] of batch i from the layer's input and its normed input, or None for uniform.
Weigh = Callable[[int, Tensor, Tensor], Tensor | None]
# A group in parts: the linears whose Hessian has the token weights, and those for which all tokens
# are alike. Each part has a Hessian of its own.
Split = Callable[[tuple[str, ...]], list[tuple[tuple[str, ...], bool]]]


@dataclass
class Part:
    """Some linears of a group, and the Hessian of their input where they need one."""

    names: tuple[str, ...]
    weighted: bool
    H: Hessian | None


@contextmanager
def without(layer: nn.Module, name: str) -> Iterator[nn.Module]:
    """The layer with one linear replaced by the identity; yields the linear's parent module."""
    parent_name, _, child = name.rpartition(".")
    parent = layer.get_submodule(parent_name)
    linear = getattr(parent, child)
    setattr(parent, child, nn.Identity())
    try:
        yield parent
    finally:
        setattr(parent, child, linear)


def run_layer(
    layer: nn.Module,
    spec: ArchitectureSpec,
    inputs: Callable[[int, Tensor], LayerInputs],
    x: ActivationStore,
    y: ActivationStore,
    work: ActivationStore,
    *,
    quantise: QuantiseGroup,
    needs_hessian: Callable[[tuple[str, ...]], bool],
    weigh: Weigh,
    uniform: Callable[[int, Tensor], Tensor | None] = lambda i, x: None,
    split: Split = lambda group: [(group, True)],
    counted: int | None = None,
    attended: Callable[[int], None] | None = None,
    device: str = "cpu",
) -> None:
    """Moves all batches in `x` [B, T, d] through the layer, quantising it on the way.

    Args:
        inputs: number of a batch, batch -> the further arguments of the attention module.
        x: the layer's inputs.
        y: where its outputs go: an empty store, or `x` itself.
        work: an empty store for what waits between two stages; empty again afterwards.
        needs_hessian: whether `quantise` is to be given the Hessian of a group.
        uniform: number of a batch, batch -> weights [B, T] where all tokens that count are alike.
        split: the parts of a group that `quantise` is given one after the other.
        counted: only the first so many batches are in the Hessians; None: all.
        attended: called with the number of each batch that has passed the quantised attention.
    """
    input_norm, post_norm = (layer.get_submodule(n) for n in (spec.input_norm, spec.post_norm))
    counted = len(x) if counted is None else counted
    weights: list[Tensor | None] = []

    def add(parts: list[Part], i: int, rows: Tensor) -> None:
        for part in parts:
            if part.H is not None and i < counted:
                part.H.add_batch(rows, weights[i] if part.weighted else uniform(i, rows))

    def statistics(group: tuple[str, ...]) -> list[Part]:
        columns = linear_in(layer, group[0]).in_features
        return [
            Part(names, weighted, Hessian(columns, device) if needs_hessian(names) else None)
            for names, weighted in split(group)
        ]

    def solve(parts: list[Part]) -> None:
        while parts:  # a Hessian is not held longer than its part
            part = parts.pop(0)
            quantise(part.names, part.H)

    def batches(store: ActivationStore) -> Iterator[tuple[int, Tensor]]:
        return ((i, store[i].to(device)) for i in range(len(x)))

    parts = statistics((spec.query, spec.key, spec.value))
    for i, z in batches(x):
        normed = input_norm(z)
        if i < counted:
            weights.append(weigh(i, z, normed))
        add(parts, i, normed)
    del z, normed  # here and below: not to be held while the group is solved
    solve(parts)

    parts = statistics((spec.output,))
    with without(layer, spec.output) as attention:
        for i, z in batches(x):
            mixed = attention(hidden_states=input_norm(z), **inputs(i, z))[0]
            if attended is not None:
                attended(i)
            work.append(mixed)
            add(parts, i, mixed)
    del z, mixed
    solve(parts)

    parts = statistics(spec.mlp_in)
    output = layer.get_submodule(spec.output)
    for i, z in batches(x):
        z = z + output(work[i].to(device))
        y.put(i, z)
        if any(part.H is not None for part in parts):  # or the norm is computed for nothing
            add(parts, i, post_norm(z))
    work.clear()
    del z
    solve(parts)

    parts = statistics((spec.mlp_out,))
    with without(layer, spec.mlp_out) as mlp:
        for i, z in batches(y):
            wide = mlp(post_norm(z))
            work.append(wide)
            add(parts, i, wide)
    del z, wide
    solve(parts)

    down = layer.get_submodule(spec.mlp_out)
    for i, z in batches(y):
        y[i] = z + down(work[i].to(device))
    work.clear()


def solve_group(
    layer: nn.Module,
    schemes: Mapping[str, Scheme],
    solver: Solver,
    H: Hessian | None,
    scale_dtype: torch.dtype,
) -> dict[str, QuantizedLinear]:
    """Quantises the linears of one group in place, and gives them back by name.

    Linears of one scheme are solved as one stack of rows: they share the Hessian.

    Args:
        schemes: name -> scheme of each linear of the group that is quantised.
        solver: of SOLVERS; H is the Hessian of the group's input if it needs one.

    Raises:
        CompressError: the Hessian cannot be factored.
    """
    stacks: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        stacks.setdefault(scheme, []).append(name)
    if not stacks:
        return {}
    statistics = None if H is None else solver.prepare(H.matrix())
    solved: dict[str, QuantizedLinear] = {}
    for scheme, names in stacks.items():
        linears = [linear_in(layer, name) for name in names]
        grid = UniformGrid(scheme.bits, scheme.symmetric, scale_dtype)
        weights = [linear.weight for linear in linears]
        W = weights[0] if len(weights) == 1 else torch.cat(weights)
        whole = solver.solve(W, statistics, grid, scheme.group_size)
        del W
        ends = accumulate(linear.out_features for linear in linears)
        for name, linear, end in zip(names, linears, ends, strict=True):
            found = whole.rows(slice(end - linear.out_features, end))
            solved[name] = solver.settle(linear.weight, found, statistics, grid, scheme.group_size)
        del weights
    del statistics  # two K x K matrices, before weights are made
    for name, part in solved.items():
        linear_in(layer, name).weight = nn.Parameter(part.weight(), requires_grad=False)
    return solved
