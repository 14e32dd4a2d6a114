"""Experts of a layer, each with linears of its own in place of transformers' fused tensors.

transformers 5 holds the experts of a layer as two parameters, `gate_up_proj` [E, 2 m, d] and
`down_proj` [E, d, m]; files, and engines, have three matrices an expert. Opened, an expert is a
module of three linears whose names are those of the files, so that one expert can be read, solved
and written by itself, and no tensor has to be renamed. Of the few families whose files hold them
fused as well, `fused.py` reads the parts.

    open_experts(model, ExpertNames("w1", "w3", "w2", block="block_sparse_moe"))
    # model.layers.0.block_sparse_moe.experts.5.w1: nn.Linear
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from compress.errors import UsageError
from compress.models.family_specs import ExpertNames

FUSED = ("gate_up_proj", "down_proj")
FUSED_BIASES = ("gate_up_proj_bias", "down_proj_bias")


# Number of an expert -> its tensors by their names inside it.
ReadExpert = Callable[[int], dict[str, Tensor]]


class EmptyLinear(nn.Linear):
    """A linear on the meta device, which draws no random numbers: a model may have 50,000."""

    def reset_parameters(self) -> None:
        """Leaves the weights as they are: nowhere."""


class Expert(nn.Module):
    """gate, up and down of one expert, by the names that they have in files."""

    def __init__(self, d: int, m: int, names: ExpertNames, bias: bool):
        super().__init__()
        self.names = names
        for name, (K, N) in zip(names.linears, [(d, m), (d, m), (m, d)], strict=True):
            self.add_module(name, EmptyLinear(K, N, bias=bias, device="meta"))

    def run(self, part: str, x: Tensor) -> Tensor:
        y: Tensor = self.get_submodule(part)(x)
        return y


@dataclass
class Routing:
    """Which experts tokens go to: for N tokens and k experts each.

    Attributes:
        index: [N, k] numbers of experts; one past the last is none.
        weight: [N, k] what an expert's output is multiplied by.
    """

    index: Tensor
    weight: Tensor

    def of(self, expert: int) -> tuple[Tensor, Tensor]:
        """The tokens that go to an expert, and their weights: [n] both."""
        token, place = torch.where(self.index == expert)
        return token, self.weight[token, place]


class OpenedExperts(nn.Module):
    """In the place of a family's fused experts, and computes the same."""

    def __init__(self, fused: nn.Module, names: ExpertNames):
        super().__init__()
        gate_up, down = (fused.get_parameter(key) for key in FUSED)
        E, *size = gate_up.shape
        if not E:
            raise UsageError("it has a router, and no experts")
        # [2 m, d] and [d, m], or as gpt-oss has them [d, 2 m] and [m, d]
        twice, d = size if size[1] == down.shape[1] else reversed(size)
        bias = FUSED_BIASES[0] in fused._parameters
        for name in (*FUSED, *FUSED_BIASES):
            fused._parameters.pop(name, None)
        self.own = (fused,)  # what stands between gate, up and down is the family's
        self.names, self.count = names, E
        self.read: ReadExpert | None = None  # None: all of them are there
        for number in range(E):
            self.add_module(str(number), Expert(d, twice // 2, names, bias))

    @contextmanager
    def at_hand(self, number: int) -> Iterator[Expert]:
        """An expert with its weights, which are read for the block if `read` is there."""
        expert = self.expert(number)
        if self.read is not None:
            expert.load_state_dict(self.read(number), assign=True)
            expert.requires_grad_(False)
        try:
            yield expert
        finally:
            if self.read is not None:
                expert.to("meta")

    def expert(self, number: int) -> Expert:
        return cast(Expert, self.get_submodule(str(number)))

    def widened(self, number: int, rows: Tensor) -> Tensor:
        """[n, d] -> [n, m], what an expert's down reads."""
        expert, names = self.expert(number), self.names
        gate, up = expert.run(names.gate, rows), expert.run(names.up, rows)
        turns = names.interleaved
        both = torch.stack([gate, up], -1).flatten(-2) if turns else torch.cat([gate, up], -1)
        return cast(Callable[[Tensor], Tensor], self.own[0]._apply_gate)(both)

    def narrowed(self, number: int, inner: Tensor) -> Tensor:
        """[n, m] -> [n, d]"""
        return self.expert(number).run(self.names.down, inner)

    def forward(self, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """[N, d] and the routing [N, k] -> [N, d]."""
        out, routing = torch.zeros_like(hidden_states), Routing(index, weights)
        for number in range(self.count):
            token, weight = routing.of(number)
            if len(token):
                with self.at_hand(number):
                    y = self.answers(number, hidden_states[token], weight)
                out.index_add_(0, token, y.to(out.dtype))
        return out

    def read_by(self, rows: Tensor, weight: Tensor) -> Tensor:
        """[n, d], what an expert reads of its tokens, given the router's weights [n]."""
        return rows * weight[:, None] if self.names.scaled_input else rows

    def answers(self, number: int, rows: Tensor, weight: Tensor) -> Tensor:
        """[n, d], what an expert adds to its tokens."""
        y = self.narrowed(number, self.widened(number, self.read_by(rows, weight)))
        return y if self.names.scaled_input else y * weight[:, None]


class StandIn(nn.Module):
    """In the place of experts: notes what they are called with, and gives what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.read: Tensor | None = None
        self.routing: Routing | None = None
        self.gives: Tensor | None = None

    def forward(self, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        self.read, self.routing = hidden_states, Routing(index, weights)
        return torch.zeros_like(hidden_states) if self.gives is None else self.gives


@contextmanager
def standing_in(layer: nn.Module, name: str) -> Iterator[tuple[StandIn, OpenedExperts]]:
    """The layer with its experts taken out; yields what stands there, and the experts."""
    opened = cast(OpenedExperts, layer.get_submodule(name))
    stand_in = StandIn()
    layer.set_submodule(name, stand_in)
    try:
        yield stand_in, opened
    finally:
        layer.set_submodule(name, opened)


def open_experts(model: nn.Module, names: ExpertNames) -> None:
    """Puts opened experts, on the meta device, in the place of all fused ones.

    The block that they are in gets the name that it has in files; the layer's forward finds it by
    its own, as an attribute that is no module's name.
    """
    modules = dict(model.named_modules())
    fused = {
        name: module
        for name, module in modules.items()
        if all(key in module._parameters for key in FUSED)
        and module.get_parameter(FUSED[0]).ndim == 3
    }
    for name, module in fused.items():
        block, _, place = name.rpartition(".")
        if names.scaled_input:
            _scale_inputs(modules[block], module)
        elif not hasattr(module, "_apply_gate"):
            raise UsageError(f"{name} has experts that are not known to be gated")
        modules[block].register_module(place, OpenedExperts(module, names))
        if names.router is not None:
            _nest(modules[block].get_submodule("router"), names.router)
        if names.renamed is not None:
            _rename(modules[block], *names.renamed)
        if names.beside is not None:
            _lift(modules[block], names.beside)
        parent, _, inner = block.rpartition(".")
        if names.block is not None and inner != names.block:
            _rename(modules[parent], inner, names.block)


def _scale_inputs(block: nn.Module, fused: nn.Module) -> None:
    """A block that gives all experts all tokens, most of them times zero, gives each its own.

    Its experts are called as those of other families are then. Its router gives the scores [N, E]
    of all experts, zero for those that a token does not go to, and its logits [N, E].
    """

    def forward(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        rows = hidden_states.flatten(0, -2)
        scores, logits = self.router(rows)
        index = logits.topk(self.top_k, dim=1).indices
        routed = self.experts(rows, index, scores.gather(1, index))
        return (self.shared_expert(rows) + routed).view_as(hidden_states), logits

    def gated(both: Tensor) -> Tensor:
        gate, up = both.chunk(2, dim=-1)
        return up * cast(Callable[[Tensor], Tensor], fused.act_fn)(gate)

    fused.__dict__["_apply_gate"] = gated
    kind = type(block)
    block.__class__ = type(kind.__name__, (kind,), {"forward": forward})


def _rename(parent: nn.Module, name: str, new: str) -> None:
    children = [(new if key == name else key, child) for key, child in parent._modules.items()]
    parent.__dict__[name] = parent._modules[name]
    parent._modules = OrderedDict(children)


def _lift(block: nn.Module, name: str) -> None:
    """Moves the router's child of this name into the block, where the router finds it still."""
    for router in [*block.children()]:
        if name in router._modules:
            child = cast(nn.Module, router._modules.pop(name))
            router.__dict__[name] = child
            block.add_module(name, child)


def _nest(module: nn.Module, child: str) -> None:
    """Moves a module's parameters into a child, where the module finds them as attributes."""
    inner, names = nn.Module(), [*module._parameters]
    for name in names:
        inner.register_parameter(name, module._parameters.pop(name))
    module.add_module(child, inner)

    def found(name: str) -> property:
        return property(lambda self: self._modules[child]._parameters[name])

    kind = type(module)
    module.__class__ = type(kind.__name__, (kind,), {name: found(name) for name in names})
