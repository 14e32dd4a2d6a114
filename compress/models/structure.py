"""How the layers of a text model are built, found by running the family's own class.

Each layer is copied without its weights; in a linear's place stands one that notes what it reads
and gives random numbers. One forward of a few tokens in fp64 then shows who reads whose output:

    attention, MLP    the layer's children that have linears, in the order in which they are called
    attention_in      linears that read what attention reads; `output` is the last one called
    norms             children whose output the two read, or that read what the two give
    scales            a, b of  y - x = a * attention + b * mlp, which must hold for random numbers
    value             the linear whose output arrives at the attention function as values, if what
                      that function returns arrives at `output` as it is
    gain, kind        what a norm makes of weights that are zero, and of a shifted input

What does not fit is refused: a family is supported as far as its forward is understood. What this
cannot see, as RoPE and masks, is the family's own at work (`Skeleton.layer_inputs`), and the check
against the source runs all of it.

    spec = look(model, spec, inputs)        # inputs: index, x -> further arguments of a layer
"""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor, nn

from compress.errors import UsageError
from compress.models.attention import Attended, attending
from compress.models.experts import OpenedExperts
from compress.models.family_specs import ArchitectureSpec, ExpertsSpec, LayerSpec

TOKENS = 3
SEED = 0
LARGEST = 2**24  # numbers of a parameter beside linears
EXACT = 1e-6  # norms compute in fp32


class Linear(nn.Module):
    """In a linear's place: notes what it reads, and gives random numbers."""

    def __init__(self, real: nn.Module, draw: torch.Generator):
        super().__init__()
        self.in_features, self.out_features = (
            int(getattr(real, side)) for side in ("in_features", "out_features")
        )
        self.draw = draw
        self.weight = torch.empty(0, dtype=torch.float64)  # some ask for its dtype
        self.read: list[Tensor] = []
        self.gave: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        y = torch.randn(*x.shape[:-1], self.out_features, generator=self.draw, dtype=x.dtype)
        self.read.append(x.clone())
        self.gave.append(y.clone())
        return y


class Experts(nn.Module):
    """In the place of opened experts: notes what they read, and gives random numbers."""

    def __init__(self, opened: OpenedExperts, draw: torch.Generator):
        super().__init__()
        self.count, self.names, self.draw = opened.count, opened.names, draw
        self.read: list[Tensor] = []

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        self.read.append(x.clone())
        return torch.randn(x.shape, generator=self.draw, dtype=x.dtype)


@dataclass
class Child:
    """A child of the layer, when it was called: what it read and what it gave."""

    name: str
    read: Tensor
    gave: Tensor


@dataclass
class Seen:
    """What one forward of a layer has shown."""

    x: Tensor
    y: Tensor
    children: list[Child]
    linears: dict[str, Linear]  # in the order in which they were called
    experts: dict[str, "Experts"] = field(default_factory=dict)
    routers: dict[str, Tensor] = field(default_factory=dict)  # and what they read
    attended: list[tuple[Attended, Tensor]] = field(default_factory=list)  # and what came back
    sinks: str | None = None  # of attention

    def child(self, name: str) -> Child:
        return next(child for child in self.children if child.name == name)

    def giving(self, tensor: Tensor, but: tuple[str, ...]) -> str | None:
        """The last child that gave a tensor."""
        found = [c.name for c in self.children if c.name not in but and same(c.gave, tensor)]
        return found[-1] if found else None

    def reading(self, tensor: Tensor, but: tuple[str, ...]) -> str | None:
        """The child that read a tensor and made another of it."""
        found = [c for c in self.children if c.name not in but and same(c.read, tensor)]
        return next((c.name for c in found if not same(c.gave, c.read)), None)


def plain(module: nn.Module) -> bool:
    """Whether a module is a linear and no more; a router may choose experts as well."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= EXACT * b.abs().max())


# ---- one forward --------------------------------------------------------------------------------


def run_copy(layer: nn.Module, x: Tensor, inputs: Mapping[str, object]) -> Seen:
    """Runs a copy of the layer whose linears give random numbers; x [1, T, d] in fp64."""
    draw = torch.Generator().manual_seed(SEED)
    calls: list[str] = []
    opened = {name: m for name, m in layer.named_modules() if isinstance(m, OpenedExperts)}
    experts = {name: Experts(module, draw) for name, module in opened.items()}
    # What stands in for opened experts is in the copy, and they, hundreds maybe, are not copied.
    layer = copy.deepcopy(layer, {id(opened[name]): experts[name] for name in opened})
    for name, module in [*layer.named_modules()]:
        if plain(module):
            if not module.weight.numel():
                raise UsageError(f"{name} has no weights")
            layer.set_submodule(name, Linear(module, draw))
    linears = {name: m for name, m in layer.named_modules() if isinstance(m, Linear)}
    for name, linear in linears.items():
        linear.register_forward_hook(lambda *_, name=name: calls.append(name))
    for module in layer.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if parameter.numel() > LARGEST:
                raise UsageError(f"it has a parameter of {list(parameter.shape)} in no linear")
            values = 1 + 0.1 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
            module._parameters[name] = nn.Parameter(values, requires_grad=False)
    layer.double()
    seen = Seen(x, x, [], {}, experts)
    for name in experts:
        block = name.rpartition(".")[0]
        for inner, module in layer.get_submodule(block).named_modules():
            weight = getattr(module, "weight", None)
            if inner and isinstance(weight, Tensor) and weight.numel():  # no stand-in has any
                module.register_forward_hook(reading(seen, f"{block}.{owner(module, inner)}"))
    for name, child in layer.named_children():
        child.register_forward_hook(noting(seen, name), with_kwargs=True)

    def attend(attended: Attended) -> Tensor:
        B, h, T, _ = attended.query.shape
        back = torch.randn(B, T, h, attended.value.shape[-1], generator=draw, dtype=x.dtype)
        seen.attended.append((attended, back))
        return back.clone()

    with torch.no_grad(), attending(layer, attend):
        y = cast(Callable[..., object], layer)(x, **inputs)
    seen.y = first_of(y)
    if seen.attended and (sinks := seen.attended[0][0].sinks) is not None:
        names = [name for name, parameter in layer.named_parameters() if parameter is sinks]
        if len(names) != 1 or sinks.shape != seen.attended[0][0].query.shape[1:2]:
            raise UsageError("its attention has sinks that are not a number for each head")
        seen.sinks = names[0]
    seen.linears = {name: linears[name] for name in dict.fromkeys(calls)}
    return seen


def reading(seen: Seen, name: str) -> Callable[..., None]:
    def note(module: nn.Module, args: tuple[Tensor, ...], gave: object) -> None:
        seen.routers[name] = args[0].clone()

    return note


def owner(module: nn.Module, name: str) -> str:
    """The module in which a weight is registered, that it has for its own or inside it."""
    found = next(n for n, m in module.named_modules() if "weight" in m._parameters)
    return f"{name}.{found}" if found else name


def noting(seen: Seen, name: str) -> Callable[..., None]:
    def note(
        module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], gave: object
    ) -> None:
        read = args[0] if args else kwargs["hidden_states"]
        seen.children.append(Child(name, read.clone(), first_of(gave).clone()))

    return note


def first_of(output: object) -> Tensor:
    """The hidden states of what a layer or a part of it returns."""
    found = output[0] if isinstance(output, tuple) else output
    assert isinstance(found, Tensor)
    return found


# ---- what it shows ------------------------------------------------------------------------------


def layer_spec(layer: nn.Module, x: Tensor, inputs: Mapping[str, object]) -> LayerSpec:
    """How a layer is built; UsageError, half a sentence, for what is not understood."""
    seen = run_copy(layer, x, inputs)
    inside = [*seen.linears, *seen.experts]
    parts = list(dict.fromkeys(name.partition(".")[0] for name in inside))
    if len(parts) != 2 or any("." not in name for name in inside):
        raise UsageError(f"its layers have linears in {', '.join(parts)}, not in attention and MLP")
    attention, mlp = parts
    lost = [n for n, m in layer.named_modules() if plain(m)]
    routed = tuple(f"{name}." for name in seen.experts)
    lost = [name for name in lost if not name.startswith(routed)]
    if lost := [name for name in lost if name not in seen.linears]:
        raise UsageError(f"nothing runs through {lost[0]}")
    attention_in, between, output = _attention(seen, attention)
    experts = _experts(seen, mlp)
    mlp_in, mlp_out = _readers(seen, mlp) if experts is None else _shared(seen, mlp, experts)
    given, fed = seen.child(attention), seen.child(mlp)
    input_norm = seen.giving(given.read, but=(attention, mlp))
    post_norm = seen.giving(fed.read, but=(attention, mlp))
    attention_after = seen.reading(given.gave, but=(attention, mlp))
    mlp_after = seen.reading(fed.gave, but=(attention, mlp))
    added = seen.child(attention_after).gave if attention_after else given.gave
    widened = seen.child(mlp_after).gave if mlp_after else fed.gave
    scales = _scales(seen, added, widened)
    start = seen.child(input_norm).read if input_norm else given.read
    middle = seen.child(post_norm).read if post_norm else fed.read
    parallel = same(middle, seen.x)
    if not same(start, seen.x) or not (parallel or close(middle, seen.x + scales[0] * added)):
        raise UsageError("its attention and MLP do not read the residual stream")
    norms = {name for name in (input_norm, post_norm, attention_after, mlp_after) if name}
    kinds = {norm_kind(layer.get_submodule(name), x) for name in norms}
    if len(kinds) != 1:
        raise UsageError("its layers have no norms, or norms of several kinds")
    [(kind, gain)] = kinds
    if len(seen.attended) > 1:
        raise UsageError("its layers attend twice")
    value, value_start = _value(seen, attention_in, output)
    return LayerSpec(
        input_norm=input_norm,
        post_norm=post_norm,
        attention_after=attention_after,
        mlp_after=mlp_after,
        attention=attention,
        mlp=mlp,
        attention_in=attention_in,
        between=between,
        value=value,
        value_start=value_start,
        output=output,
        mlp_in=mlp_in,
        mlp_out=mlp_out,
        experts=experts,
        scales=scales,
        parallel=parallel,
        gain=gain,
        norms=kind,
        attends=bool(seen.attended),
        softcap=seen.attended[0][0].softcap if seen.attended else None,
        sinks=seen.sinks,
    )


def _experts(seen: Seen, mlp: str) -> ExpertsSpec | None:
    """The experts of the MLP; UsageError for linears beside them, and for other inputs."""
    if not seen.experts:
        return None
    if len(seen.experts) > 1:
        raise UsageError("its layers have experts in several places")
    [(module, experts)] = seen.experts.items()
    given = seen.child(mlp).read
    flat = given.flatten(0, -2)
    if len(experts.read) != 1 or not same(experts.read[0], flat):
        raise UsageError(f"{module} does not read what its block is given")
    read = dict(seen.routers)
    inside = [(n, m) for n, m in seen.linears.items() if n.startswith(f"{mlp}.")]
    # A linear that gives a number for each expert is a router, one that gives a single one the gate
    # of a shared expert.
    gates = [name for name, linear in inside if linear.out_features in (1, experts.count)]
    read |= {name: seen.linears[name].read[0] for name in gates}
    if odd := [name for name, x in read.items() if not same(x.flatten(0, -2), flat)]:
        raise UsageError(f"{odd[0]} does not read what {module} reads")
    routers = tuple(read)
    return ExpertsSpec(module, experts.count, experts.names, routers)


def _shared(seen: Seen, mlp: str, experts: ExpertsSpec) -> tuple[tuple[str, ...], str]:
    """The linears of a shared expert: those that read what the block is given, and its last."""
    flat = seen.child(mlp).read.flatten(0, -2)
    inside = [n for n in seen.linears if n.startswith(f"{mlp}.") and n not in experts.routers]
    readers = tuple(n for n in inside if same(seen.linears[n].read[0].flatten(0, -2), flat))
    last = [name for name in inside if name not in readers]
    if not inside:
        return (), ""
    if len(last) != 1 or not readers:
        raise UsageError(f"{inside[0]} is not a linear of one shared expert")
    return readers, last[0]


def _attention(seen: Seen, part: str) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...], str]:
    """The linears that read what attention is given, those between in groups, and its last."""
    inside = [name for name in seen.linears if name.startswith(f"{part}.")]
    given, last = seen.child(part).read, inside[-1]
    readers = tuple(n for n in inside[:-1] if same(seen.linears[n].read[0], given))
    if not readers or not same(seen.linears[last].gave[0], seen.child(part).gave):
        raise UsageError(f"{inside[0]} is not a linear at the start or the end of it")
    groups: list[list[str]] = []
    for name in (name for name in inside[:-1] if name not in readers):
        x = seen.linears[name].read[0]
        if x.shape[:-1].numel() != given.shape[:-1].numel() or len(seen.linears[name].read) > 1:
            raise UsageError(f"{name} does not read one row for each token")
        known = next((g for g in groups if same(seen.linears[g[0]].read[0], x)), None)
        if known is None:
            groups.append([name])
        else:
            known.append(name)
    return readers, tuple(map(tuple, groups)), last


def _readers(seen: Seen, part: str) -> tuple[tuple[str, ...], str]:
    """The linears that read what a part is given, and the one that ends it."""
    inside = [name for name in seen.linears if name.startswith(f"{part}.")]
    given, last = seen.child(part).read, inside[-1]
    readers = tuple(n for n in inside[:-1] if same(seen.linears[n].read[0], given))
    between = [name for name in inside[:-1] if name not in readers]
    if between or not readers or not same(seen.linears[last].gave[0], seen.child(part).gave):
        raise UsageError(f"{(between or inside)[0]} is not a linear at the start or the end of it")
    return readers, last


def _scales(seen: Seen, added: Tensor, widened: Tensor) -> tuple[float, float]:
    """a, b of y - x = a * added + b * widened."""
    columns = torch.stack([added.flatten(), widened.flatten()], dim=1)
    change = (seen.y - seen.x).flatten()
    found = torch.linalg.lstsq(columns, change.unsqueeze(1)).solution.squeeze(1)
    if not close(columns @ found, change):
        raise UsageError("its layers do not only add attention and MLP to the residual stream")
    a, b = (snapped(float(scale)) for scale in found)
    return a, b


def _value(seen: Seen, readers: tuple[str, ...], output: str) -> tuple[str | None, int]:
    """The linear whose rows are the value heads, and the first of those rows."""
    if not seen.attended:
        return None, 0
    attended, back = seen.attended[0]
    if not same(seen.linears[output].read[0], back.flatten(-2)):
        return None, 0
    values = attended.value.transpose(1, 2).flatten(-2)
    for name in readers:
        gave = seen.linears[name].gave[0]
        start = gave.shape[-1] - values.shape[-1]
        if start >= 0 and same(gave[..., start:], values):
            return name, start
    return None, 0


def norm_kind(norm: nn.Module, x: Tensor) -> tuple[str, float]:
    """The kind of a norm and its gain, as in `LayerSpec`; x [1, T, d] in fp64."""

    def made(weight: float, of: Tensor = x) -> Tensor:
        filled = copy.deepcopy(norm)
        for name, parameter in norm.named_parameters():
            value = 0.0 if name.endswith("bias") else weight
            full = torch.full(parameter.shape, value, dtype=torch.float64)
            filled.register_parameter(name, nn.Parameter(full, requires_grad=False))
        return cast(Callable[[Tensor], Tensor], filled.double())(of)

    with torch.no_grad():
        weighted = any(True for _ in norm.parameters())
        gain = 1.0 if weighted and bool(made(0.0).abs().max() > 0) else 0.0
        unit = made(1.0 - gain)
        if bool((unit - made(1.0 - gain, x + 3)).abs().max() < 1e-3):
            return "layer", gain
        rms = x * torch.rsqrt(x.square().mean(-1, keepdim=True))
        return ("rms" if bool((unit - rms).abs().max() < 1e-3) else "other"), gain


# ---- a whole model ------------------------------------------------------------------------------


def look(
    model: nn.Module,
    spec: ArchitectureSpec,
    hidden_size: int,
    inputs: Callable[[int, Tensor], Mapping[str, object]],
) -> ArchitectureSpec:
    """The parts of a text model on the meta device.

    Args:
        spec: the names of its layers, embedding and head.
        inputs: index of a layer, x [1, T, d] -> the further arguments of its forward.

    Raises UsageError where the model is built in a way that is not understood.
    """
    base = model.get_submodule(spec.layers.rpartition(".")[0])
    layers = model.get_submodule(spec.layers)
    draw = torch.Generator().manual_seed(SEED)
    x = torch.randn(1, TOKENS, hidden_size, generator=draw, dtype=torch.float64)
    known: dict[object, LayerSpec] = {}
    kinds: list[LayerSpec] = []
    for index, layer in enumerate(cast(nn.ModuleList, layers)):
        modules = tuple((name, type(module)) for name, module in layer.named_modules())
        key = (modules, tuple((n, tuple(p.shape)) for n, p in layer.named_parameters()))
        if key not in known:
            known[key] = layer_spec(layer, x, inputs(index, x))
        kinds.append(known[key])
    final = _final_norm(base, spec)
    kind, gain = norm_kind(base.get_submodule(final), x)
    if kind != kinds[0].norms:
        raise UsageError("its last norm is of another kind than those of its layers")
    return replace(
        spec,
        final_norm=f"{spec.layers.rpartition('.')[0]}.{final}",
        kinds=tuple(kinds) if len(known) > 1 else (kinds[0],),
        final_gain=gain,
    )


def _final_norm(base: nn.Module, spec: ArchitectureSpec) -> str:
    """The child that stands behind the layers."""
    known = [name.rpartition(".")[2] for name in (spec.layers, spec.embedding, spec.rotary)]
    others = [
        name
        for name, child in base.named_children()
        if name not in known and not isinstance(child, nn.Dropout)
    ]
    if len(others) != 1:
        raise UsageError(f"there is no telling which is its last norm: {', '.join(others)}")
    return others[0]


def with_rotary(model: nn.Module, spec: ArchitectureSpec) -> ArchitectureSpec:
    """The parts of a model with the name that its own class gives what makes RoPE tables."""
    place = spec.layers.rpartition(".")[0]
    found = [
        f"{place}.{name}"
        for name, child in model.get_submodule(place).named_children()
        if any(buffer.endswith("inv_freq") for buffer in child._buffers)
    ]
    return replace(spec, rotary=found[0]) if len(found) == 1 else spec


def embedding_scale(embedding: nn.Module, ids: Tensor) -> float:
    """What an embedding's own module multiplies its rows by."""
    filled = copy.deepcopy(embedding)
    assert isinstance(filled, nn.Embedding)
    filled.weight = nn.Parameter(torch.ones(len(ids), 1), requires_grad=False)
    filled.padding_idx = None
    with torch.no_grad():
        return uniform_scale(filled(ids), torch.ones(len(ids), 1))


def uniform_scale(found: Tensor, given: Tensor) -> float:
    """s of found = s * given; UsageError if there is none."""
    ratio = (found / given).flatten()
    scale = float(ratio[0])
    if not bool((ratio - scale).abs().max() <= EXACT * abs(scale)):
        raise UsageError("its embeddings are not only multiplied by a number")
    return snapped(scale)


def snapped(number: float) -> float:
    """The short number that was meant, where one is that near."""
    near = round(number, 6)
    return near if math.isclose(near, number, rel_tol=1e-12) else number
