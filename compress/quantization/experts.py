"""Takes every calibration token through the experts of one layer, one expert at a time.

They take turns behind the router, whose choice is that of the layer as it is quantised. Tokens are
routed once; then, for each expert, with the rows of the tokens t that it gets,

    norm(x)[t]         -> H -> gate, up of the expert
    act(gate) * up     -> H -> down of the expert, whose outputs are added up in `work`

and at the end the family's own block, given that sum as what its experts make, ends the layer. In
memory is one expert, if the layer reads them when their turn comes, and its Hessian.

A token weighs in an expert's Hessian what it weighs in the layer's others; with `routing_weight`,
times what the router multiplies the expert's output by. (Llama 4's multiplies what the expert
reads, and is in its Hessian so.) An expert that fewer than `least_rows` counted tokens reach
follows `policy`, since one that none reaches would have no Hessian at all:

    all_tokens        its Hessians are those of all tokens, each weighing as in the layer, times no
                      weight of the router
    rtn               its weights are rounded to nearest
    shared_hessian    its Hessians are the sum of its own and those of all experts that enough
                      tokens reach, which come before it; where there are none, all_tokens

    ExpertPass(stages, spec.experts, section, scarce).run()     # stages: of the layer, up to here
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from compress.data.activations import ActivationStore
from compress.models.experts import OpenedExperts, Routing, StandIn, standing_in
from compress.models.family_specs import ExpertsSpec, LayerSpec
from compress.models.skeleton import linear_in
from compress.quantization.hessian import Hessian, Part, needed
from compress.quantization.shares import Whole
from compress.recipe.quantize import Experts, Policy

# What is told about an expert with few rows: its number, how many counted tokens reached it, and
# the policy that it followed.
Scarce = Callable[[int, int, Policy], None]


class Stages(Protocol):
    """What experts need of the pass through their layer; `LayerPass` is one."""

    layer: nn.Module
    spec: LayerSpec
    x: ActivationStore
    y: ActivationStore
    work: ActivationStore
    counted: int
    device: str
    weights: list[Tensor | None]
    shares: Whole

    @property
    def quantise(self) -> Callable[[tuple[str, ...], Hessian | None], None]: ...

    @property
    def needs_hessian(self) -> Callable[[tuple[str, ...]], bool]: ...

    def stage(
        self, group: tuple[str, ...], before: Callable[[list[Part]], None], *, keep: bool
    ) -> None: ...

    def norm(self, name: str | None) -> Callable[[Tensor], Tensor]: ...

    def behind_o(self) -> Callable[[Tensor, Tensor], Tensor]: ...

    def batches(self, store: ActivationStore) -> Iterator[tuple[int, Tensor]]: ...

    def parts_of(self, group: tuple[str, ...]) -> list[Part]: ...

    def complete(self, parts: list[Part]) -> None: ...

    def add(self, parts: list[Part], i: int, rows: Tensor, rows0: Tensor | None) -> None: ...

    def token_weights(self, i: int, weighted: bool, z: Tensor) -> Tensor | None: ...


@dataclass
class ExpertPass:
    """All batches on their way through the experts of a layer, behind its attention."""

    stages: Stages
    experts: ExpertsSpec
    section: Experts
    scarce: Scarce
    # Of the experts that enough tokens reach, by whether it is that of down, and weighted.
    pooled: dict[tuple[bool, bool], Hessian] = field(default_factory=dict)
    # The stream with attention's output, and the one that the MLP reads: the layer's input where
    # both read that, which `y` may not overwrite then.
    attended: ActivationStore = field(init=False)
    read: ActivationStore = field(init=False)

    def __post_init__(self) -> None:
        stages, work = self.stages, self.stages.work
        self.attended = self.read = stages.y
        if stages.spec.parallel:
            self.attended = ActivationStore(work.folder, "attended", work.numbers, summed=False)
            self.read = stages.x

    def run(self) -> None:
        """All of the layer behind attention."""
        stages, spec = self.stages, self.stages.spec
        with standing_in(stages.layer, self.experts.module) as (stand_in, opened):
            routings = self.routed(stand_in)
            if spec.mlp_out:
                stages.stage(spec.mlp_in, self.before_shared, keep=False)
                stages.stage((spec.mlp_out,), self.before_shared_down, keep=False)
            for number, policy in self.turns(routings):
                with opened.at_hand(number) as expert:
                    # Its linears are looked up by name in the layer, where the stand-in is.
                    stand_in.add_module(str(number), expert)
                    self.through(opened, routings, number, policy)
                    del stand_in._modules[str(number)]
            norm, after = stages.norm(spec.post_norm), stages.norm(spec.mlp_after)
            block, scale = stages.layer.get_submodule(spec.mlp), spec.scales[1]
            for i, z in stages.batches(self.read):
                stand_in.gives = stages.work[i].to(stages.device)
                y = block(norm(z))
                y = after(y[0] if isinstance(y, tuple) else y)  # some give the router's scores too
                z = self.attended[i].to(stages.device)
                stages.y.put(i, z + y if scale == 1.0 else z + scale * y)
        if stages.spec.parallel:
            self.attended.clear()
        stages.work.clear()

    def turns(self, routings: list[Routing]) -> Iterator[tuple[int, Policy | None]]:
        """Each expert, and the policy that it follows for want of rows."""
        late: list[int] = []
        numbers = range(self.experts.count)
        reached = self.stages.shares.total([self.reached(routings, number) for number in numbers])
        for number, rows in zip(numbers, reached, strict=True):
            inner, outer = self.experts.inner(number), (self.experts.outer(number),)
            solved = self.stages.needs_hessian(inner) or self.stages.needs_hessian(outer)
            if rows >= self.section.least_rows or not solved:
                yield number, None
            elif self.section.policy == "shared_hessian":
                late.append(number)
            else:
                self.scarce(number, rows, self.section.policy)
                yield number, self.section.policy
        for number in late:
            policy: Policy = "shared_hessian" if self.pooled else "all_tokens"
            self.scarce(number, reached[number], policy)
            yield number, policy

    def routed(self, stand_in: StandIn) -> list[Routing]:
        """x += o(.), which goes to `attended`, and where the router sends each batch's tokens.

        `work` has the sums of the experts' outputs from here on, which are zero.
        """
        stages, spec = self.stages, self.stages.spec
        norm, behind = stages.norm(spec.post_norm), stages.behind_o()
        block = stages.layer.get_submodule(spec.mlp)
        routings = []
        for i, z in stages.batches(stages.x):
            self.attended.put(i, behind(z, stages.work[i].to(stages.device)))
            block(norm(self.read[i].to(stages.device)))
            assert stand_in.routing is not None, "it was called"
            routings.append(stand_in.routing)
            stages.work[i] = torch.zeros_like(z).flatten(0, -2)
        stand_in.read = None
        return routings

    def before_shared(self, parts: list[Part]) -> None:
        """norm(x), for the expert that gets every token."""
        stages = self.stages
        norm = stages.norm(stages.spec.post_norm)
        for i, z in stages.batches(self.read) if needed(parts) else ():
            stages.add(parts, i, norm(z), None)

    def before_shared_down(self, parts: list[Part]) -> None:
        """act(gate) * up of the same."""
        stages, spec = self.stages, self.stages.spec
        norm, block = stages.norm(spec.post_norm), stages.layer.get_submodule(spec.mlp)
        read: list[Tensor] = []
        last = linear_in(stages.layer, spec.mlp_out)
        handle = last.register_forward_pre_hook(lambda module, given: read.append(given[0]))
        try:
            for i, z in stages.batches(self.read) if needed(parts) else ():
                block(norm(z))
                stages.add(parts, i, read.pop().view(*z.shape[:-1], -1), None)
        finally:
            handle.remove()

    def through(
        self, opened: OpenedExperts, routings: list[Routing], number: int, policy: Policy | None
    ) -> None:
        """Quantises one expert, and adds its outputs to the sums in `work`."""
        stages = self.stages
        norm = stages.norm(stages.spec.post_norm)
        for group in (self.experts.inner(number), (self.experts.outer(number),)):
            outer = group == (self.experts.outer(number),)
            if policy == "rtn":
                stages.quantise(group, None)
                continue
            parts = stages.parts_of(group)
            for i, z in stages.batches(self.read) if needed(parts) else ():
                if i >= stages.counted:
                    break
                rows = z.flatten(0, -2)
                token, weight = self.chosen(routings[i], number, len(rows), policy)
                if len(token):
                    rows = norm(rows[token.to(rows.device)])
                    if policy != "all_tokens":
                        rows = opened.read_by(rows, routings[i].of(number)[1])
                    rows = opened.widened(number, rows) if outer else rows
                    self.add_rows(parts, i, rows, token, weight, z)
            stages.complete(parts)
            self.pool(parts, outer, policy)
            while parts:
                part = parts.pop(0)
                stages.quantise(part.names, part.H)
        for i, z in stages.batches(self.read):
            token, given = routings[i].of(number)
            if len(token):
                y = opened.answers(number, norm(z.flatten(0, -2)[token]), given)
                stages.work[i] = stages.work[i].to(stages.device).index_add(0, token, y)

    def chosen(
        self, routing: Routing, number: int, count: int, policy: Policy | None
    ) -> tuple[Tensor, Tensor | None]:
        """The tokens, of so many, that are in an expert's Hessian, and the router's weights."""
        if policy == "all_tokens":
            return torch.arange(count), None
        token, weight = routing.of(number)
        return token, weight if self.section.routing_weight else None

    def reached(self, routings: Iterable[Routing], number: int) -> int:
        """How many counted tokens go to an expert: those that weigh anything."""
        rows = 0
        for i, routing in enumerate(routings):
            if i >= self.stages.counted:
                break
            token, _ = routing.of(number)
            w = self.stages.weights[i]
            rows += len(token) if w is None else int((w.flatten()[token.to(w.device)] > 0).sum())
        return rows

    def add_rows(
        self,
        parts: list[Part],
        i: int,
        rows: Tensor,
        token: Tensor,
        given: Tensor | None,
        z: Tensor,
    ) -> None:
        """Adds rows [n, K], those of some tokens of batch i, to the Hessians.

        `given` [n]: what the router multiplies their outputs by, where that counts.
        """
        for part in parts:
            if part.H is None:
                continue
            w = self.stages.token_weights(i, part.weighted, z)
            w = None if w is None else w.flatten()[token.to(w.device)].to(rows.device)
            if given is not None:
                w = given.to(rows.device, rows.dtype) * (1.0 if w is None else w)
            part.H.add_batch(rows[None], None if w is None else w[None])

    def pool(self, parts: list[Part], outer: bool, policy: Policy | None) -> None:
        """Adds an expert's Hessians to the pool, or the pool to those of one that has few rows."""
        if self.section.policy != "shared_hessian" or policy == "all_tokens":
            return
        for part in parts:
            if part.H is None:
                continue
            key = (outer, part.weighted)
            if policy == "shared_hessian":
                part.H.absorb(self.pooled[key])
            elif key in self.pooled:
                self.pooled[key].absorb(part.H)
            else:
                self.pooled[key] = part.H.copy()
