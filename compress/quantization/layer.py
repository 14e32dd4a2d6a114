"""Takes every calibration token through one decoder layer and quantises its linears on the way.

The layer `x += o(attention(norm(x))); x += down(mlp(norm(x)))`, or one that is built otherwise, as
its `LayerSpec` says, is run in stages. A stage gives the input of one group of linears, from which
the group's Hessian is built; the group is quantised; the next stage runs through the quantised
weights ("true sequential"):

    norm(x)            -> H -> q, k, v          of latent attention (MLA): then what is between
    attention(norm(x)) -> H -> o          x += o(.)
    norm(x)            -> H -> gate, up
    act(gate) * up     -> H -> down       x += down(.)

So no linear sees a token twice (q and k do where token importance looks at their attention map),
where running the whole layer once a group costs five passes. What a stage leaves for after its
group, the input of o or of down, waits in a second store.

A stage's input is what the family's own module computes with its output projection taken out, so
attention and activation functions are never written again here. Where attention and MLP are both of
the layer's input, which must be kept until both are there, the MLP's inside is computed twice.

Experts, in a layer that has such, come in the place of the last two (`experts.py`).

Where the target is the 16-bit model's output, that model's activations x0 pass beside them: each
batch goes through the stage's 16-bit weights right behind its twin, so the two inputs of a group
are there together. What is kept for that are a group's 16-bit weights until the next stage is
through, and nothing of x0 waits between stages.

    run_layer(layer, spec, inputs, x, y, work, quantise=..., needs_hessian=..., weigh=...)
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor, nn

from compress.data.activations import ActivationStore
from compress.models.family_specs import LayerSpec
from compress.models.own_forward import LayerInputs
from compress.models.skeleton import linear_in
from compress.quantization.experts import ExpertPass, Scarce
from compress.quantization.hessian import Hessian, Part, needed
from compress.quantization.inside import catching, replaced, without
from compress.quantization.shares import WHOLE, Piece, Whole, solve_piece
from compress.quantization.solvers import QuantizedLinear, Solver, Target, settled
from compress.recipe.quantize import Experts
from compress.scheme import Scheme

# Quantises the linears of a group, in place in the layer, given the Hessian of their input; the
# Hessian is None where no linear of the group needs one.
QuantiseGroup = Callable[[tuple[str, ...], Hessian | None], None]
# Token weights [B, T] of batch i from the layer's input and its normed input, or None for uniform.
Weigh = Callable[[int, Tensor, Tensor], Tensor | None]
# A group in parts: the linears whose Hessian has the token weights, and those for which all tokens
# are alike. Each part has a Hessian of its own.
Split = Callable[[tuple[str, ...]], list[tuple[tuple[str, ...], bool]]]


class Twin:
    """The 16-bit model's activations beside those of the pass, for the counted batches.

    Without a 16-bit model, and for other batches, all it gives is None.
    """

    def __init__(
        self,
        layer: nn.Module,
        x: ActivationStore | None,
        y: ActivationStore | None,
        counted: int,
        device: str,
    ):
        assert (x is None) == (y is None), "inputs and outputs of the 16-bit model go together"
        self.layer, self.x, self.y, self.counted, self.device = layer, x, y, counted, device
        self.kept: dict[str, Tensor] = {}

    def keep(self, group: Iterable[str]) -> None:
        """Keeps a group's 16-bit weights, for the pass behind its quantisation, and no others."""
        there = self.x is not None
        self.kept = {name: linear_in(self.layer, name).weight for name in group if there}

    def normed(
        self, i: int, store: ActivationStore | None, norm: Callable[[Tensor], Tensor]
    ) -> Tensor | None:
        """What a norm gives for batch i of a store: of `x`, or of `y`."""
        return None if store is None or i >= self.counted else norm(store[i].to(self.device))

    def through(
        self,
        i: int,
        store: ActivationStore | None,
        part: Callable[[int, Tensor], Tensor],
        after: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor | None:
        """The input of a linear for batch i of a store, and the stream behind it to `y`.

        `part`: from the stream to that input; it runs with the weights that are kept. `after`: from
        the stream and that input to the stream behind the linear.
        """
        if store is None or self.y is None or i >= self.counted:
            return None
        z = store[i].to(self.device)
        with replaced(self.layer, self.kept):
            inner = part(i, z)
        self.y.put(i, after(z, inner))
        return inner


@dataclass
class LayerPass:
    """All batches on their way through one layer; the fields are arguments of `run_layer`.

    Each `before_...` moves them to the input of its group and adds that to the group's Hessians.
    """

    layer: nn.Module
    spec: LayerSpec
    inputs: Callable[[int, Tensor], LayerInputs]
    x: ActivationStore
    y: ActivationStore
    work: ActivationStore
    quantise: QuantiseGroup
    needs_hessian: Callable[[tuple[str, ...]], bool]
    weigh: Weigh
    uniform: Callable[[int, Tensor], Tensor | None]
    split: Split
    counted: int
    attended: Callable[[int], None] | None
    twin: Twin
    device: str
    experts: Experts
    scarce: Scarce
    shares: Whole
    weights: list[Tensor | None] = field(default_factory=list)  # of tokens, for each counted batch

    def run(self) -> None:
        """The four stages, or those of experts in the place of the last two."""
        spec = self.spec
        odd = spec.parallel or spec.experts is not None or spec.between
        assert not (odd and self.twin.x is not None), "the plan refuses it"
        self.stage(spec.attention_in, self.before_qkv, keep=True)
        for group in spec.between:
            self.stage(group, partial(self.before_between, group[0]), keep=False)
        self.stage((spec.output,), self.before_o, keep=False)
        if spec.experts is not None:
            ExpertPass(self, spec.experts, self.experts, self.scarce).run()
            return
        self.stage(spec.mlp_in, self.before_gate_up, keep=True)
        self.stage((spec.mlp_out,), self.before_down, keep=False)
        self.after_down()

    def stage(
        self, group: tuple[str, ...], before: Callable[[list[Part]], None], *, keep: bool
    ) -> None:
        """Moves the batches to the group's input, then quantises it.

        `keep`: whether the twin goes through the group's 16-bit weights in the next stage.
        """
        parts = self.parts_of(group)
        before(parts)  # a method of its own: no batch is held while the group is solved
        self.complete(parts)
        self.twin.keep(group if keep else ())
        while parts:  # a Hessian is not held longer than its part
            part = parts.pop(0)
            self.quantise(part.names, part.H)

    def before_qkv(self, parts: list[Part]) -> None:
        """norm(x), and the token weights."""
        norm = self.norm(self.spec.input_norm)
        for i, z in self.batches(self.x):
            normed = norm(z)
            if i < self.counted:
                self.weights.append(self.weigh(i, z, normed))
            if needed(parts):
                self.add(parts, i, normed, self.twin.normed(i, self.twin.x, norm))

    def before_between(self, name: str, parts: list[Part]) -> None:
        """What a linear inside attention reads; it does not wait, being computed again for o."""
        with catching(self.layer, name) as caught:
            for i, z in self.batches(self.x) if needed(parts) else ():
                if i < self.counted:
                    rows = caught(z, **self.inputs(i, z))  # [B, T, K], or with an axis for heads
                    self.add(parts, i, rows.reshape(*z.shape[:-1], -1), None)

    def before_o(self, parts: list[Part]) -> None:
        """attention(norm(x)), which waits in `work`."""
        behind = self.behind_o()
        with catching(self.layer, self.spec.output) as caught:

            def attend(i: int, z: Tensor) -> Tensor:
                return caught(z, **self.inputs(i, z))

            for i, z in self.batches(self.x):
                mixed = attend(i, z)
                if self.attended is not None:
                    self.attended(i)
                self.work.append(mixed)
                self.add(parts, i, mixed, self.twin.through(i, self.twin.x, attend, behind))

    def before_gate_up(self, parts: list[Part]) -> None:
        """x += o(.), which goes to `y`, and norm(x); o(.) stays in `work` where x is still read."""
        norm, behind = self.norm(self.spec.post_norm), self.behind_o()
        for i, z in self.batches(self.x):
            mixed = self.work[i].to(self.device)
            if self.spec.parallel:
                self.work[i] = behind(torch.zeros_like(z), mixed)
            else:
                z = behind(z, mixed)
                self.y.put(i, z)
            if needed(parts):  # or the norm would be computed for nothing
                self.add(parts, i, norm(z), self.twin.normed(i, self.twin.y, norm))
        if not self.spec.parallel:
            self.work.clear()

    def before_down(self, parts: list[Part]) -> None:
        """act(gate) * up, which waits in `work` unless that is taken."""
        behind = self.behind_down()
        with self.widening() as widen:
            if self.spec.parallel:
                for i, z in self.batches(self.x) if needed(parts) else ():
                    self.add(parts, i, widen(i, z), None)
                return
            for i, z in self.batches(self.y):
                wide = widen(i, z)
                self.work.append(wide)
                self.add(parts, i, wide, self.twin.through(i, self.twin.y, widen, behind))

    def after_down(self) -> None:
        """x += down(.), in `y`."""
        behind = self.behind_down()
        if self.spec.parallel:
            with self.widening() as widen:
                for i, z in self.batches(self.x):
                    self.y.put(i, behind(z + self.work[i].to(self.device), widen(i, z)))
        else:
            for i, z in self.batches(self.y):
                self.y[i] = behind(z, self.work[i].to(self.device))
        self.work.clear()

    def token_weights(self, i: int, weighted: bool, z: Tensor) -> Tensor | None:
        """Of the tokens z of batch i [B, T], or None where they are alike."""
        return self.weights[i] if weighted else self.uniform(i, z)

    # ---- parts of the layer ---------------------------------------------------------------------

    def norm(self, name: str | None) -> Callable[[Tensor], Tensor]:
        return (lambda x: x) if name is None else self.layer.get_submodule(name)

    @contextmanager
    def widening(self) -> Iterator[Callable[[int, Tensor], Tensor]]:
        """What makes the input of down of the stream."""
        norm = self.norm(self.spec.post_norm)
        with without(self.layer, self.spec.mlp_out) as _:
            mlp = self.layer.get_submodule(self.spec.mlp)
            yield lambda i, z: mlp(norm(z))

    def behind_o(self) -> Callable[[Tensor, Tensor], Tensor]:
        """From the stream and what o reads to the stream with attention's output."""
        spec = self.spec
        return self.behind(spec.output, spec.attention_after, spec.scales[0])

    def behind_down(self) -> Callable[[Tensor, Tensor], Tensor]:
        """From the stream and what down reads to the stream with the MLP's output."""
        spec = self.spec
        return self.behind(spec.mlp_out, spec.mlp_after, spec.scales[1])

    def behind(
        self, name: str, after: str | None, scale: float
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """z, inner -> z + scale * after(last(inner)), where `name` is that of last."""
        last, norm = linear_in(self.layer, name), self.norm(after)

        def add(z: Tensor, inner: Tensor) -> Tensor:
            y = norm(last(inner))
            return z + y if scale == 1.0 else z + scale * y

        return add

    def batches(self, store: ActivationStore) -> Iterator[tuple[int, Tensor]]:
        return ((i, store[i].to(self.device)) for i in range(len(self.x)))

    def parts_of(self, group: tuple[str, ...]) -> list[Part]:
        """The parts of a group, whose Hessians are still empty."""
        columns, drift = linear_in(self.layer, group[0]).in_features, self.twin.x is not None
        return [
            Part(
                names,
                weighted,
                self.shares.hessian(columns, self.device, drift)
                if self.needs_hessian(names)
                else None,
            )
            for names, weighted in self.split(group)
        ]

    def complete(self, parts: list[Part]) -> None:
        """Makes the Hessians those of all tokens."""
        for part in parts:
            if part.H is not None:
                self.shares.complete(part.H)

    def add(self, parts: list[Part], i: int, rows: Tensor, rows0: Tensor | None) -> None:
        """Adds batch i to the Hessians; `rows0`: the same in the 16-bit model."""
        for part in parts:
            if part.H is not None and i < self.counted:
                w = self.weights[i] if part.weighted else self.uniform(i, rows)
                part.H.add_batch(rows, w, rows0)


def run_layer(
    layer: nn.Module,
    spec: LayerSpec,
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
    x0: ActivationStore | None = None,
    y0: ActivationStore | None = None,
    device: str = "cpu",
    experts: Experts | None = None,
    scarce: Scarce = lambda number, rows, policy: None,
    shares: Whole = WHOLE,
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
        x0, y0: inputs of the 16-bit model for the counted batches, and where its outputs go: an
            empty store, or `x0` itself. Hessians then have their drift. None: there is no such.
        experts: what few tokens of an expert mean; None: as a recipe does that does not say.
        scarce: told about each expert that fewer tokens reach, and what was done instead.
        shares: what this process has of the tokens: the batches in x are its own.
    """
    counted = len(x) if counted is None else counted
    LayerPass(
        layer,
        spec,
        inputs,
        x,
        y,
        work,
        quantise,
        needs_hessian,
        weigh,
        uniform,
        split,
        counted,
        attended,
        Twin(layer, x0, y0, counted, device),
        device,
        experts or Experts(),
        scarce,
        shares,
    ).run()


def solve_group(
    layer: nn.Module,
    schemes: Mapping[str, Scheme],
    solver: Solver,
    H: Hessian | None,
    scale_dtype: torch.dtype,
    shares: Whole = WHOLE,
) -> dict[str, QuantizedLinear]:
    """Quantises the linears of one group in place, and gives them back by name.

    Linears of one scheme are solved as one stack of rows: they share the Hessian.

    Args:
        schemes: name -> scheme of each linear of the group that is quantised.
        solver: of SOLVERS; H is the Hessian of the group's input if it needs one. Where that has
            drifted, the target is the 16-bit model's output.
        shares: which rows this process solves; it gets all of them back.

    Raises:
        CompressError: the Hessian cannot be factored.
    """
    stacks: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        stacks.setdefault(scheme, []).append(name)
    if not stacks:
        return {}
    first = linear_in(layer, next(iter(schemes))).weight
    columns, device = first.shape[1], first.device
    linears = {s: dict(zip(names, _rows(layer, names), strict=True)) for s, names in stacks.items()}
    pieces: list[Piece] = []
    for scheme, rows in linears.items():
        stack = slice(0, max(part.stop for part in rows.values()))
        for extent, other in ((stack, False), *((part, True) for part in rows.values())):
            parts = shares.parts(extent, columns, device)
            pieces += [Piece(scheme, part, other) for part in parts]

    def solve(numbers: Iterable[int]) -> dict[int, QuantizedLinear]:
        """Those of the pieces with these numbers that there is something for."""
        mine = list(numbers)
        targets: dict[Scheme, Target] = {}
        if H is not None and (drift := H.take_drift()) is not None and mine:
            targets = {s: Target.of(_stacked(layer, names), *drift) for s, names in stacks.items()}
            del drift  # two K x K matrices, before there are others
        statistics = None if H is None or not mine else solver.prepare(H.matrix())
        found: dict[int, QuantizedLinear] = {}
        for scheme, names in stacks.items():
            own = [number for number in mine if pieces[number].scheme == scheme]
            if not own:
                continue
            W = _stacked(layer, names)
            target = targets.pop(scheme, None)
            for number in own:
                rows = pieces[number].rows
                aim = None if target is None else target.rows(rows)
                result = solve_piece(pieces[number], W[rows], solver, statistics, scale_dtype, aim)
                if result is not None:
                    found[number] = result
        return found

    found = shares.solved(pieces, columns, solve, device)
    solved: dict[str, QuantizedLinear] = {}
    for scheme, rows in linears.items():
        own = [each for each in zip(pieces, found, strict=True) if each[0].scheme == scheme]
        whole = _joined([result for piece, result in own if not piece.alternative])
        assert whole is not None, "a solver finds something for all rows"
        for name, part in rows.items():
            inside = range(part.start, part.stop)
            others = [r for piece, r in own if piece.alternative and piece.rows.start in inside]
            solved[name] = settled(whole.rows(part), _joined(others))
    for name, linear in solved.items():
        linear_in(layer, name).weight = nn.Parameter(linear.weight(), requires_grad=False)
    return solved


def _rows(layer: nn.Module, names: list[str]) -> Iterator[slice]:
    """Where each linear lies in the stack of them."""
    sizes = [linear_in(layer, name).out_features for name in names]
    for size, end in zip(sizes, accumulate(sizes), strict=True):
        yield slice(end - size, end)


def _joined(parts: list[QuantizedLinear | None]) -> QuantizedLinear | None:
    """All rows of what there is of each part; None where the solver has none."""
    there = [part for part in parts if part is not None]
    return QuantizedLinear.join(there) if there else None


def _stacked(layer: nn.Module, names: list[str]) -> Tensor:
    """The weights of linears that share an input, one below the other."""
    weights = [linear_in(layer, name).weight for name in names]
    return weights[0] if len(weights) == 1 else torch.cat(weights)
