"""The walk over the decoder layers, each quantised as the calibration data passes through it.

One layer is in memory at a time.

    for each layer: read, fuse norms, rotate -> token weights -> Hessians -> solve -> pack
        -> part file, journal -> visual tokens pruned, where a stage lies before the next layer

    walk = LayerWalk(recipe.quantize, model, plan, stream, journal, ...)
    walk.run(first=0); walk.facts
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

from compress.checkpoint.engines import Schemes
from compress.checkpoint.packed_formats import FORMATS, codes_of_signed
from compress.errors import naming
from compress.importance.tokens import count_tokens
from compress.importance.weighting import effective_sample_size
from compress.kernels.codes import Codes
from compress.memory import moved, release_memory
from compress.models.fused import joined
from compress.models.skeleton import linear_in
from compress.observer import Observer
from compress.pipeline.journal import Journal, LayerFacts, ModuleFacts, ScarceExpert
from compress.pipeline.plan import Plan
from compress.pipeline.stream import CalibrationStream
from compress.pipeline.token_sample import layers_shown, weights_shown
from compress.pruning.last_token import LastTokenAttention
from compress.quantization.hessian import Hessian
from compress.quantization.layer import run_layer, solve_group
from compress.quantization.sharing import shares_of
from compress.quantization.solvers import (
    SOLVERS,
    QuantizedLinear,
    SolverSettings,
    make_solver,
)
from compress.quantization.tables import Rows, solve_table
from compress.quantization.token_weights import TokenWeigher
from compress.recipe.quantize import Policy, Quantize
from compress.rotation.model import RotatedModel
from compress.scheme import PlannedModule, Scheme

# What is done with experts that few tokens reach, for people.
POLICIES: dict[Policy, str] = {
    "all_tokens": "quantised for all tokens",
    "rtn": "rounded to nearest",
    "shared_hessian": "quantised for the tokens of all experts",
}
RELEASE_BYTES = 1 << 23
HEAD_WEIGHTS = "head-weights.safetensors"  # in the folder of the activations


@dataclass
class WeightsSeen:
    """What is told of the token weights of a layer, batch by batch.

    Attributes:
        sizes: effective sample sizes of a window. tokens: of a window. counted: those that count.
        shown: weights of the first tokens of all.
    """

    sizes: list[float] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    counted: list[float] = field(default_factory=list)
    shown: list[float] = field(default_factory=list)

    @classmethod
    def of_all(cls, each: Sequence[Mapping[str, list[float]]]) -> "WeightsSeen":
        """What all ranks have seen; the first one has the first tokens."""
        found = {name: [x for rank in each for x in rank[name]] for name in each[0]}
        return cls(**found | {"shown": each[0]["shown"]})


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 1)


class LayerWalk:
    """Quantises layer after layer; `facts` are what modelpress.json says about each."""

    def __init__(
        self,
        section: Quantize,
        model: RotatedModel,
        plan: Plan,
        stream: CalibrationStream,
        journal: Journal,
        observer: Observer,
        warn: Callable[[str], None],
    ):
        self.section, self.model, self.plan = section, model, plan
        self.stream, self.journal = stream, journal
        self.observer, self.warn = observer, warn
        self.skeleton, self.spec = model.skeleton, model.spec
        self.device, self.dtype = model.device, model.dtype
        self.solver = make_solver(section)
        self.rounding = SOLVERS["rtn"](SolverSettings(clip_search="magnitude"))
        counts = torch.zeros(self.skeleton.config.vocab_size, dtype=torch.int64)
        for ids, mask in stream.data.parts:
            counts += count_tokens(ids, mask, len(counts))
        # The list itself: where visual tokens are pruned, its batches become shorter.
        masked = not all(bool(mask.all()) for _, mask in stream.data.parts)
        self.weigher = TokenWeigher(section.token_importance, stream.batches, counts, masked)
        self.ranks = stream.ranks
        self.shares = shares_of(self.ranks, stream.spool(), section.refine_sweeps)
        # Of the last layer's tokens, for a head that is quantised: by batch.
        self.last_weights: dict[int, Tensor] = {}
        self.tables: list[LayerFacts] = []  # of the embedding, where it is quantised
        self.facts = journal.facts()
        for layer in self.facts:
            for module in layer["modules"]:
                self._warn_of(module)
            self._warn_of_weights(layer)
            self._warn_of_experts(layer)

    def run(self, first: int) -> None:
        """All decoder layers from `first`, which is the first that the journal does not have."""
        total = len(self.plan.layers)
        if first == total and self._weighs_head():
            noted = self.stream.noted(HEAD_WEIGHTS)
            own = enumerate(map(str, self.stream.numbers))
            self.last_weights = {i: noted[number] for i, number in own if number in noted}
        self.observer.stage("layers")
        for index in range(first, total):
            self.observer.layers(index, total)
            started = time.perf_counter()
            tensors, facts = self._layer(index)
            facts["seconds"] = round(time.perf_counter() - started, 3)
            if index == total - 1 and self._weighs_head():
                numbers, weights = self.stream.numbers, self.last_weights
                noted = self.ranks.gather({str(numbers[i]): w for i, w in weights.items()})
                if self.ranks.first:
                    self.stream.note(HEAD_WEIGHTS, noted)
            state = self.stream.state()
            if self.ranks.first:
                self.journal.record(index, tensors, facts, state)
            self.ranks.meet()  # nobody writes over this layer's inputs before
            del tensors  # or they would be there while the next layer is solved
            release_memory()
            self.facts.append(facts)
        self.observer.layers(total, total)
        self.facts += self.tables

    def _weighs_head(self) -> bool:
        """Whether the head has a Hessian, whose tokens weigh what they do in the last layer."""
        name = self.spec.head
        head = self.plan.module(name)
        if head is None or self.plan.shared or not self._needs_hessian({name: head.scheme}):
            return False
        return self.section.token_importance.applies_to(name)

    # ---- one layer ------------------------------------------------------------------------------

    def _layer(self, index: int) -> tuple[dict[str, Tensor], LayerFacts]:
        """Quantises layer `index` of the result and moves the activations through it."""
        skeleton, stream = self.skeleton, self.stream
        prefix, source = f"{self.spec.layers}.{index}.", self.plan.layers[index]
        spec = self.spec.layer(source)
        schemes = {n: self.plan.schemes[prefix + n] for n in spec.linears}
        written: dict[str, Tensor] = {}

        def ready(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            """In fp32 on the device; what stays unquantised goes to `written` as it is stored."""
            for name in list(tensors):
                tensor = tensors.pop(name)
                if schemes.get(name.removesuffix(".weight")) is None:
                    tensor = self.model.stored(f"{self.spec.layers}.{source}.{name}", tensor)
                    stored = skeleton.stored_dtype(prefix + name, self.dtype)
                    written[prefix + name] = tensor.to(stored)
                tensors[name] = moved(tensor, self.device)
            return tensors

        weights = ready(self.model.layer_tensors(source))
        modules: list[ModuleFacts] = []
        scarce: list[ScarceExpert] = []
        alike: set[str] = set()  # linears that the token weights are not for
        solved = 0  # bytes of weights since memory was given back
        seen = WeightsSeen()
        with ExitStack() as opened:
            layer = opened.enter_context(
                skeleton.layer(
                    source,
                    weights,
                    self.device,
                    lambda number: ready(self.model.expert_tensors(source, number)),
                )
            )
            del weights
            release_memory()  # of what they were rotated in

            def quantise(group: tuple[str, ...], H: Hessian | None) -> None:
                written.update(self._solve(prefix, layer, _chosen(group, schemes), H, modules))
                # Memory peaks in the MLP: before it and in its middle, what is free goes back, and
                # among many experts after some. More often costs more in page faults than it saves.
                nonlocal solved
                solved += sum(linear_in(layer, name).weight.nbytes for name in group)
                many = spec.experts is not None and solved > RELEASE_BYTES
                if many or spec.output in group or spec.mlp_in[-1:] == group[-1:]:
                    release_memory()
                    solved = 0

            def split(group: tuple[str, ...]) -> list[tuple[tuple[str, ...], bool]]:
                parts = self.weigher.parts(f"{self.spec.layers}.{source}.", group)
                alike.update(prefix + name for names, on in parts for name in names if not on)
                return parts

            y, y0 = stream.outputs(index), stream.twin_outputs(index)
            run_layer(
                layer,
                spec,
                lambda i, x: stream.layer_inputs(source, i, x),
                stream.x,
                y,
                stream.scratch(),
                quantise=quantise,
                needs_hessian=lambda group: self._needs_hessian(_chosen(group, schemes)),
                weigh=lambda i, x, normed: self._weigh(layer, source, i, x, normed, seen),
                uniform=self.weigher.uniform,
                split=split,
                counted=len(stream.batches),
                attended=self._ranking(layer, index, source, opened),
                x0=stream.x0,
                y0=y0,
                device=self.device,
                experts=self.section.experts,
                scarce=lambda number, rows, policy: scarce.append(
                    {"expert": number, "rows": rows, "policy": policy}
                ),
                shares=self.shares,
            )
        if self.ranks.first:
            self._join(written, prefix, source)
        stream.advance(y, index + 1, y0)
        facts: LayerFacts = {"layer": index, "modules": modules}
        if self.ranks.size > 1:
            facts["ranks"] = self.ranks.size
            facts["deterministic"] = self.ranks.deterministic
        if source != index:
            facts["source_layer"] = source
        if scarce:
            facts["scarce_experts"] = scarce
            self._warn_of_experts(facts)
        self._note_weights(facts, seen, alike)
        return written, facts

    def _join(self, written: dict[str, Tensor], prefix: str, source: int) -> None:
        """Puts experts back together that the files of the model hold as one tensor."""
        names = (name.removeprefix(prefix) for name in written)
        wholes = self.skeleton.written_wholes(source, bool(self.plan.modules))
        for name, whole in joined(names, wholes).items():
            inside = {n: written.pop(prefix + n) for part in whole.parts for n in part}
            written[prefix + name] = whole.join(inside)

    def _note_weights(self, facts: LayerFacts, own: WeightsSeen, alike: set[str]) -> None:
        """What all ranks have seen of token weights; `alike`: linears that these are not for."""
        seen = WeightsSeen.of_all(self.ranks.collect(asdict(own)))
        for sums in self.ranks.collect(self.weigher.taken()):
            self.weigher.put(sums)
        if not seen.sizes:
            return
        facts["effective_sample_size"] = _mean(seen.sizes)
        facts["tokens_per_window"] = _mean(seen.tokens)
        facts.update(self.weigher.facts())
        self._warn_of_weights(facts)
        if seen.shown and facts["layer"] in layers_shown(len(self.plan.layers)):
            facts["token_weights"] = seen.shown
        for module in facts["modules"]:
            if module["name"] in alike:
                module["effective_sample_size"] = _mean(seen.counted)

    def _weigh(
        self,
        layer: nn.Module,
        source: int,
        i: int,
        x: Tensor,
        normed: Tensor,
        seen: WeightsSeen,
    ) -> Tensor | None:
        """Token weights of a batch, None for uniform; what is told of them goes to `seen`."""
        if self.solver is None or not self.solver.needs_hessian:
            return None
        inputs = self.stream.layer_inputs(source, i, x)
        spec = self.spec.layer(source)
        w = self.weigher.weights(i, x, normed, layer, spec, inputs)
        if w is not None and source == self.plan.layers[-1] and self._weighs_head():
            self.last_weights[i] = w.cpu()
        if i == 0 and w is not None and self.section.token_importance.name != "uniform":
            seen.shown.extend(weights_shown(w))
        ids, mask = self.stream.batches[i]
        counted = mask.sum(-1).double().mean().item()
        seen.sizes.append(counted if w is None else effective_sample_size(w))
        seen.tokens.append(float(ids.shape[1]))
        seen.counted.append(counted)
        return w

    def _ranking(
        self, layer: nn.Module, index: int, source: int, opened: ExitStack
    ) -> Callable[[int], None] | None:
        """Notes what each prompt's last token attends to, if the stage after this layer asks."""
        stream = self.stream
        if not stream.ranks_before(index + 1):
            return None
        tap = LastTokenAttention(layer.get_submodule(self.spec.layer(source).attention))
        for handle in tap.install():
            opened.callback(handle.remove)

        def attended(i: int) -> None:
            if i in stream.prompts:
                x = stream.x[i].to(self.device)
                tap.turned(stream.layer_inputs(source, i, x)["position_embeddings"])
                valid = stream.prompts[i].views[-1].valid.to(self.device)
                stream.scores[i] = tap.scores(valid).cpu()

        return attended

    # ---- one group of linears -------------------------------------------------------------------

    def _needs_hessian(self, schemes: Mapping[str, Scheme]) -> bool:
        return self.solver is not None and self.solver.needs_hessian and bool(schemes)

    def _solve(
        self,
        prefix: str,
        layer: nn.Module,
        schemes: Mapping[str, Scheme],
        H: Hessian | None,
        modules: list[ModuleFacts],
    ) -> dict[str, Tensor]:
        """Quantises linears that share an input, in place; returns their packed tensors.

        What is said about each goes to `modules`.
        """
        if self.solver is None or not schemes:
            return {}
        started = time.perf_counter()
        with naming(f"{prefix}{next(iter(schemes))}"):
            # An expert without a Hessian of its own may be rounded to nearest.
            rounds = self.solver.needs_hessian and H is None
            solver = self.rounding if rounds else self.solver
            solved = solve_group(layer, schemes, solver, H, self.dtype, self.shares)
        tensors: dict[str, Tensor] = {}
        for name, linear in solved.items() if self.ranks.first else ():  # who writes them
            tensors |= self._packed(prefix + name, linear, schemes[name])[1]
        seconds = (time.perf_counter() - started) / max(1, len(solved))
        for name, linear in solved.items():
            self._note(prefix + name, linear, schemes[name], seconds, modules)
        return tensors

    def _packed(
        self, name: str, linear: QuantizedLinear, scheme: Scheme
    ) -> tuple[Codes, dict[str, Tensor]]:
        """A linear's codes, and its tensors in the file."""
        scale = self.model.stored(f"{name}.weight_scale", linear.scale)
        codes = codes_of_signed(linear.codes, scale, linear.zero, scheme)
        format = FORMATS[self.plan.table_formats.get(name, "pack-quantized")]
        packed = format.write(codes, scheme)
        return codes, {f"{name}.{key}": tensor for key, tensor in packed.items()}

    def _note(
        self,
        name: str,
        linear: QuantizedLinear,
        scheme: Scheme,
        seconds: float,
        modules: list[ModuleFacts],
    ) -> None:
        """Puts what is said about a linear among the modules, and says it."""
        facts: ModuleFacts = {
            "name": name,
            "bits": scheme.bits,
            "group_size": scheme.group_size,
            "error": linear.relative_error(),
            "damping": linear.damping,
            "dead_columns": linear.dead_columns,
            "changed": [round(share, 6) for share in linear.changed],
            "seconds": round(seconds, 3),
        }
        if linear.rounded:
            facts["rounded_to_nearest"] = True
        modules.append(facts)
        self.observer.module(name, facts)
        self._warn_of(facts)

    def note_table(self, planned: PlannedModule, seconds: float) -> None:
        """Puts the embedding, rounded to nearest before the walk, among the facts."""
        facts: ModuleFacts = {
            "name": planned.name,
            "bits": planned.bits,
            "group_size": planned.scheme.group_size,
            "error": None,
            "damping": None,
            "dead_columns": 0,
            "changed": [],
            "seconds": round(seconds, 3),
        }
        self.tables = [{"layer": None, "modules": [facts], "seconds": facts["seconds"]}]

    def solve_head(
        self, table: Rows, norm: nn.Module, scheme: Scheme
    ) -> tuple[Codes | None, dict[str, Tensor]]:
        """Quantises the head like any other linear; its input is the final norm's output.

        Returns its codes, and the packed tensors; of several ranks the first has them.
        """
        name, H = self.spec.head, None
        if self._needs_hessian({name: scheme}):
            x0 = self.stream.x0
            H = self.shares.hessian(table.shape[1], self.device, x0 is not None)
            for i, (_, mask) in enumerate(self.stream.batches):
                x = norm(self.stream.x[i].to(self.device))
                twin = None if x0 is None else norm(x0[i].to(self.device))
                w = self.last_weights.get(i)
                w = mask.float() if w is None else w
                H.add_batch(x, w.to(self.device), twin)
            self.shares.complete(H)
        assert self.solver is not None, "a head that is quantised is so by a solver"
        started = time.perf_counter()
        with naming(name):
            linear = solve_table(
                table, scheme, self.solver, H, self.dtype, self.device, self.shares
            )
        modules: list[ModuleFacts] = []
        codes: Codes | None = None
        packed: dict[str, Tensor] = {}
        if self.ranks.first:
            codes, packed = self._packed(name, linear, scheme)
        self._note(name, linear, scheme, time.perf_counter() - started, modules)
        self.facts.append({"layer": None, "modules": modules, "seconds": modules[0]["seconds"]})
        return codes, packed

    def _warn_of_weights(self, facts: LayerFacts) -> None:
        """Says where the scores of tokens told nothing."""
        if flat := facts.get("flat_windows"):
            self.warn(
                f"layer {facts['layer']}: in {flat} windows all tokens score the same by "
                f"{self.section.token_importance.name}, and weigh the same"
            )

    def _warn_of_experts(self, facts: LayerFacts) -> None:
        """Says which experts too few tokens reached."""
        for policy, what in POLICIES.items():
            scarce = [e for e in facts.get("scarce_experts", []) if e["policy"] == policy]
            if scarce:
                least = min(scarce, key=lambda expert: expert["rows"])
                self.warn(
                    f"layer {facts['layer']}: {len(scarce)} experts were reached by fewer than "
                    f"{self.section.experts.least_rows} tokens (expert {least['expert']} by "
                    f"{least['rows']}), and are {what}"
                )

    def _warn_of(self, facts: ModuleFacts) -> None:
        """Says what was out of the ordinary about a module."""
        damping = self.section.damping
        if facts["damping"] is not None and facts["damping"] > damping:
            self.warn(f"{facts['name']}: damping was raised from {damping} to {facts['damping']}")
        if facts["dead_columns"]:
            self.warn(f"{facts['name']}: {facts['dead_columns']} inputs were always zero")
        if facts.get("rounded_to_nearest"):
            self.warn(
                f"{facts['name']}: gptq was worse than rounding to nearest on its own Hessian, "
                "which was kept instead"
            )


def _chosen(group: tuple[str, ...], schemes: Schemes) -> dict[str, Scheme]:
    """The linears of a group that are quantised, and how."""
    return {name: scheme for name in group if (scheme := schemes[name]) is not None}
