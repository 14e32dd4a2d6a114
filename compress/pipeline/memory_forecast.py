"""What a run will need of the host's memory, at its peak, from the recipe and the headers alone.

host_memory(inputs, shapes); device_memory(inputs, shapes)

The peak of resident memory of the process that runs, shared libraries included, as
`modelpress.json` and `bench quantize` give it (VmHWM on Linux), to 10 %: the fixed cost of Python,
torch and transformers, what is known of each expert, and the most of

    the text while windows are drawn from it (`text_forecast.py`)
    a layer as it is read, fused and rotated in fp64; of its experts one at a time
    a layer in fp32, what is written of it, and a group of its linears being solved or a batch in
        flight
    the embedding or the head as it is written, or its codes, and the logits of a probe
    what the scores of `allocate` need

each but the first with the activations of all calibration windows that wait beside it, unless they
go to disk.

With `quantize.target: full_precision` the 16-bit model's activations between layers come on top,
two more statistics of the widest linear's input, and the 16-bit weights of a group while its
outputs are taken.

Two processes of their own are not in it. That of the source check holds a module at a time; that of
the self-check has tables, what is not packed and one layer in fp32 (`verify.reload_memory`).
Evaluation comes after the peak and loads the result.
"""

import math
from collections.abc import Iterable

from compress.allocation.scores import copies_of_states
from compress.data.activations import TOKENS_PER_BATCH, activations_on_disk
from compress.data.windows import PROBE_TOKENS
from compress.eval.windows import CHUNK_ELEMENTS, scored_at_once
from compress.importance.tokens import QUERIES
from compress.models.families import experts_per_token
from compress.models.skeleton import Skeleton
from compress.pipeline.inputs import RunInputs
from compress.pipeline.pruning_forecast import calibration_tokens
from compress.pipeline.text_forecast import library_memory, text_memory
from compress.quantization.solvers import LEAST_ROWS, WEIGHTS_AT_A_TIME
from compress.recipe.sections import MEASURED_SCORES
from compress.rotation.rotate import VALUES_AT_ONCE
from compress.scheme import Scheme

Shapes = dict[str, tuple[int, int]]  # of linears, by full name
Linears = list[tuple[int, int]]

# Python, torch, transformers and what a run imports on its way: 500 to 520 MB on Linux with CPU
# torch 2.13, of which 200 MB are pages of library files. The kernel maps more of them where it has
# room (310 MB were seen right after an installation), and takes them back where it has none.
FIXED_MEMORY = 515 * 10**6
EXPERT_MEMORY = 10_000  # the modules, headers, plan and facts of one
SOLVER_COPIES = 2  # of a Hessian while it is factored: itself, and its factor
LINEAR_COPIES = 3  # of a linear that is solved at several widths
ROW_COPIES = 6  # of the rows that are solved at a time
LOGIT_COPIES = 8  # of a chunk of logits while a divergence is taken of two of them
SINK_MAPS, CAPPED_MAPS = 3, 2  # copies of attention's maps, where transformers makes them whole
CONTEXT = 600 * 10**6  # of a GPU's libraries
HOLES = 32 * 10**6  # larger blocks are given back at once; smaller ones leave holes in the heap
TURNED = 8 * 3  # bytes of a number in a linear that is being rotated, beside the result's
# Bytes of a number in a table that is rounded (its codes, in parts and joined, and as they are
# packed), and in one that is solved, which has an alternative as well.
ROUNDED_CODES, SOLVED_CODES = 4, 5
TURNED_PIECE = 8 * 6  # the same in a piece of the embedding or head, with the result


def split_groups(inputs: RunInputs) -> list[tuple[str, ...]]:
    """The groups of linears that share an input and not the token weights: two Hessians each.

    Names in the model, of one layer that has most of them; only linears that are quantised count.
    """
    recipe, skeleton = inputs.recipe, inputs.skeleton
    section = recipe.quantize.token_importance
    if section.modules is None or not recipe.calibrates:
        return []
    found: list[list[tuple[str, ...]]] = [[]]
    for index in range(skeleton.num_layers):
        prefix = f"{skeleton.spec.layers}.{index}."
        kind = skeleton.spec.layer(index)
        groups = [tuple(prefix + name for name in group) for group in kind.groups]
        quantised = [tuple(n for n in group if recipe.quantize.quantises(n)) for group in groups]
        found.append([g for g in quantised if len({section.applies_to(n) for n in g}) > 1])
    return max(found, key=len)


def second_hessians(inputs: RunInputs, shapes: Shapes) -> list[int]:
    """Bytes of the Hessian that each split group has more than others."""
    return [4 * shapes[group[0]][1] ** 2 for group in split_groups(inputs)]


def host_memory(inputs: RunInputs, shapes: Shapes) -> int:
    """Bytes."""
    skeleton = inputs.skeleton
    kinds = (skeleton.spec.layer(index) for index in range(skeleton.num_layers))
    experts = sum(kind.experts.count for kind in kinds if kind.experts)
    fixed = FIXED_MEMORY + experts * EXPERT_MEMORY
    work = max(_run(inputs, shapes), _scores(inputs, shapes))
    if inputs.source.used and not inputs.source.images and not inputs.source.given:
        fixed += library_memory(inputs)
        work = max(work, text_memory(inputs))
    return fixed + work


def device_memory(inputs: RunInputs, shapes: Shapes) -> int:
    """Bytes on the GPU that computes, 0 where none does: arithmetic that no GPU has been asked for.

    What the host promises is then more than it needs, since it counts what is computed here.
    """
    if not inputs.device.startswith("cuda"):
        return 0
    layers = (_LayerNeed(inputs, shapes, i) for i in range(inputs.skeleton.num_layers))
    solved = inputs.skeleton.config.vocab_size * _hidden(inputs) * SOLVED_CODES
    head = solved if inputs.recipe.quantize.head is not None else 0
    return CONTEXT + max(head, *(layer.at_work() for layer in layers))


def _run(inputs: RunInputs, shapes: Shapes) -> int:
    """Of the walk that rotates and quantises, and of what stands before and behind it."""
    recipe, skeleton = inputs.recipe, inputs.skeleton
    vocabulary = _vocabulary(inputs)
    # The vision tower encodes in fp32, beside its tensors as they are written.
    tower = sum(skeleton.model.get_parameter(name).numel() for name in skeleton.vision_names())
    seeing = tower * (4 + skeleton.dtype.itemsize) + (vocabulary if tower else 0)
    layers = [_LayerNeed(inputs, shapes, index) for index in range(skeleton.num_layers)]
    kept = _kept(inputs, max(layer.widest for layer in layers))
    between = kept * skeleton.config.hidden_size * 4
    total = max(vocabulary + between, seeing + between, *(layer.peak(kept) for layer in layers))
    pruning = recipe.prune_visual_tokens
    if pruning is not None and pruning.search is not None:
        total = max(total, skeleton.reader.nbytes())
    if not inputs.source.used:
        return total
    twin = between if recipe.quantize.target.name == "full_precision" else 0
    return total + twin + _added(inputs)


def _kept(inputs: RunInputs, widest: int) -> int:
    """The calibration tokens whose activations are in memory: all or, where on disk, none."""
    if not inputs.source.used:
        return 0
    twin = inputs.recipe.quantize.target.name == "full_precision"
    tokens, hidden = calibration_tokens(inputs.source, inputs.skeleton), _hidden(inputs)
    everything = tokens * (hidden * (2 if twin else 1) + widest) * 4
    return 0 if activations_on_disk(inputs.recipe.calibration.offload, everything) else tokens


def _hidden(inputs: RunInputs) -> int:
    return int(inputs.skeleton.config.hidden_size)


class _LayerNeed:
    """What one decoder layer needs, its own parts in turn.

    Attributes:
        widest: of what waits in it between two of its stages, beside its input.
    """

    def __init__(self, inputs: RunInputs, shapes: Shapes, index: int):
        self.inputs, self.shapes = inputs, shapes
        spec = inputs.skeleton.spec
        self.kind, self.prefix = spec.layer(index), f"{spec.layers}.{index}."
        self.solves = inputs.source.used  # with Hessians
        kind, hidden = self.kind, _hidden(inputs)
        behind = hidden if kind.experts else self.shape(kind.mlp_out)[1]
        self.widest = max(self.shape(kind.output)[1], behind)

    def shape(self, name: str) -> tuple[int, int]:
        return self.shapes[self.prefix + name]

    def numbers(self, names: Iterable[str]) -> int:
        return sum(math.prod(self.shape(name)) for name in names)

    def peak(self, kept: int) -> int:
        """Bytes, with what waits of so many tokens."""
        kind, hidden = self.kind, 4 * _hidden(self.inputs)
        resting = kind.resting
        readers = (*kind.attention_in, *kind.mlp_in)
        phases = [self.opened(resting.linears, readers) + kept * hidden]
        there = 4 * self.numbers(resting.linears) + self.written(resting.linears)
        waits = {kind.output: self.shape(kind.output)[1]}
        if kind.experts is None:
            waits[kind.mlp_out] = self.shape(kind.mlp_out)[1]
        batch = max(self.batch(self.widest), self.batch(self.shape(kind.output)[1]) + self.maps())
        for group in resting.groups:
            waiting = kept * (hidden + 4 * waits.get(group[-1], 0))
            phases.append(there + waiting + max(batch, self.solving(group)))
        if kind.experts is not None:
            phases += self.of_experts(there, kept)
        most = max(phases) + self.second()
        return most + min(most // 4, HOLES)

    def at_work(self) -> int:
        """Bytes of what is computed with at a time, of one batch and group."""
        kind = self.kind
        batch = max(self.batch(self.widest), self.batch(self.shape(kind.output)[1]) + self.maps())
        works = [max(batch, *(self.solving(group) for group in kind.resting.groups))]
        if kind.experts is not None:
            inner, outer = kind.experts.inner(0), kind.experts.outer(0)
            work = max(self.batch(self.shape(outer)[1]), self.solving(inner))
            works.append(4 * self.numbers((*inner, outer)) + max(work, self.solving((outer,))))
        return 4 * self.numbers(kind.resting.linears) + max(works) + self.second()

    def of_experts(self, there: int, kept: int) -> list[int]:
        """The same of experts, beside what is `there` of the layer: one of them is at work.

        What is written of each, which of those in 16 bits is one tensor at the end where files have
        it so; where each token goes; and Hessians that experts share.
        """
        experts, inputs = self.kind.experts, self.inputs
        assert experts is not None
        inner, outer = experts.inner(0), experts.outer(0)
        names = (*inner, outer)
        written = experts.count * self.written(names)
        # The stream, with attention's output or beside it, and the sums of their outputs.
        waiting = kept * (12 if self.kind.parallel else 8) * _hidden(inputs)
        if self.solves:
            chosen = experts_per_token(inputs.skeleton.config)
            waiting += calibration_tokens(inputs.source, inputs.skeleton) * chosen * (8 + 4)
            if inputs.recipe.quantize.experts.policy == "shared_hessian":
                waiting += sum(4 * K**2 for K in {self.shape(n)[1] for n in names})
        rows = self.batch(self.shape(outer)[1])
        work = max(rows, self.solving(inner), self.solving((outer,)))
        reading, working = self.opened(names, inner), 4 * self.numbers(names) + work
        at_work = max(reading, working) + min(reading, working, HOLES)
        joined = 0
        if inputs.skeleton.wholes and all(self.scheme(name) is None for name in names):
            joined = self.written(inner) * experts.count
        return [there + written + waiting + at_work, written + joined + waiting]

    def opened(self, names: Iterable[str], readers: Iterable[str]) -> int:
        """Linears as they are read, and in fp64 where they are rotated: once more those that read a
        norm's output, which are fused before."""
        sizes = [math.prod(self.shape(name)) for name in names]
        stored = self.inputs.skeleton.dtype.itemsize
        if self.inputs.recipe.rotate.kind == "none":
            return 4 * sum(sizes) + (stored * max(sizes) if stored < 4 else 0)
        return (stored + 8) * sum(sizes) + 8 * self.numbers(readers) + TURNED * max(sizes)

    def scheme(self, name: str) -> Scheme | None:
        quantize = self.inputs.recipe.quantize
        return quantize.scheme_for(self.prefix + name, self.shape(name)[1])

    def written(self, names: Iterable[str]) -> int:
        """Linears as the file has them."""
        total, itemsize = 0.0, self.inputs.dtype.itemsize
        for name in names:
            (N, K), scheme = self.shape(name), self.scheme(name)
            if scheme is None:
                total += N * K * itemsize
            else:
                total += N * (K * scheme.bits / 8 + K // (scheme.group_size or K) * itemsize)
        return round(total)

    def solving(self, group: tuple[str, ...]) -> int:
        """A group that is solved as one stack of rows, beside its weights."""
        quantize = self.inputs.recipe.quantize
        if quantize.method == "none" or all(self.scheme(name) is None for name in group):
            return 0
        K, numbers = self.shape(group[0])[1], self.numbers(group)
        most = WEIGHTS_AT_A_TIME[self.inputs.device.partition(":")[0]]
        rows = min(numbers, max(LEAST_ROWS * K, most))
        stack = 4 * numbers if len(group) > 1 else 0
        solved = stack + 2 * numbers + 4 * ROW_COPIES * rows  # codes, in parts and joined
        if not self.solves:
            return solved
        square = 4 * K**2 * (2 if quantize.act_order else 1)
        if quantize.target.name == "full_precision":
            # H, D and F; gate and up as they were; W D
            return max(SOLVER_COPIES + 2, 3) * square + 2 * 4 * numbers + solved
        return max(SOLVER_COPIES * square, 2 * square + solved)

    def batch(self, widest: int) -> int:
        """A batch in flight, and the statistics of its linear's input."""
        if not self.solves:
            return 0
        tokens = max(TOKENS_PER_BATCH, self.inputs.recipe.calibration.length)
        numbers = tokens * (_hidden(self.inputs) + 3 * widest) + widest**2
        if self.inputs.recipe.quantize.target.name == "full_precision":
            numbers += tokens * (_hidden(self.inputs) + 2 * widest) + 2 * widest**2
        return 4 * numbers

    def maps(self) -> int:
        """Attention's maps of a batch: whole where transformers makes them, or so many queries."""
        recipe, heads = self.inputs.recipe, self.inputs.skeleton.config.num_attention_heads
        if not self.solves:
            return 0
        length = recipe.calibration.length
        tokens = max(TOKENS_PER_BATCH, length)
        copies = CAPPED_MAPS if self.kind.softcap is not None else 0
        copies = SINK_MAPS if self.kind.sinks is not None else copies
        weighed = recipe.quantize.token_importance.name == "attention_concentration"
        return 4 * heads * tokens * max(copies * length, 2 * QUERIES * weighed)

    def second(self) -> int:
        """The Hessian that a group has more than others whose token weights split it."""
        return max(second_hessians(self.inputs, self.shapes), default=0) if self.solves else 0


def _added(inputs: RunInputs) -> int:
    """What a tower adds to prompts behind later layers, which waits in memory."""
    if not inputs.source.images:
        return 0
    vision = inputs.skeleton.model_config.vision_config
    levels = len(getattr(vision, "deepstack_visual_indexes", ()))
    tokens = calibration_tokens(inputs.source, inputs.skeleton) if levels else 0
    return tokens * inputs.skeleton.config.hidden_size * 4 * levels


def _scores(inputs: RunInputs, shapes: Shapes) -> int:
    """Of the walk that measures what each unit would lose, and of a divergence at its end."""
    section, c, skeleton = inputs.recipe.allocate, inputs.recipe.calibration, inputs.skeleton
    if section is None or not section.reads_windows:
        return 0
    hidden = skeleton.config.hidden_size
    inside = _inside(skeleton, shapes)
    layer = sum(N * K for N, K in inside)
    windows = min(section.samples, c.samples * c.expansion)
    states = windows * c.length * hidden * 4
    kinds = [skeleton.spec.layer(index) for index in range(skeleton.num_layers)]
    units = sum(1 if section.unit == "layer" else len(kind.groups) for kind in kinds)
    diverging = section.importance.base == "logit_divergence"
    stored = states * copies_of_states(section, units)
    if activations_on_disk(c.offload, stored):
        stored = 0
    measured = section.method == "evolve" or section.importance.base in MEASURED_SCORES
    walk = layer * (4 + skeleton.dtype.itemsize) + stored
    if measured:  # every group's Hessian, and the layer's codes at every width
        hessians = max(
            sum(columns**2 * 4 for columns in _columns(skeleton, shapes, index))
            for index in range(skeleton.num_layers)
        )
        hessians += sum(second_hessians(inputs, shapes))
        walk += _working(c.length, skeleton, inside) + hessians + layer * len(section.widths)
    chunk = min(c.length * skeleton.config.vocab_size, CHUNK_ELEMENTS) * 4
    head = 4 * skeleton.config.vocab_size * hidden + _piece(inputs) + chunk * LOGIT_COPIES
    if section.method == "evolve":  # the windows before, after the 16-bit model, and after another
        return max(walk, head + max(3 * states, stored if diverging else 0))
    return max(walk, head + stored if diverging else 0)


def _inside(skeleton: Skeleton, shapes: Shapes) -> Linears:
    """The linears that are in memory together, of the layer that has most weights."""
    layers = [_at_once(skeleton, shapes, index) for index in range(skeleton.num_layers)]
    return max(layers, key=lambda linears: sum(N * K for N, K in linears))


def _at_once(skeleton: Skeleton, shapes: Shapes, index: int) -> Linears:
    """The linears of a layer that are in memory together: all but its experts, and one of these."""
    kind, prefix = skeleton.spec.layer(index), f"{skeleton.spec.layers}.{index}."
    alone = (*kind.experts.inner(0), kind.experts.outer(0)) if kind.experts else ()
    return [shapes[prefix + name] for name in (*kind.resting.linears, *alone)]


def _columns(skeleton: Skeleton, shapes: Shapes, index: int) -> list[int]:
    """The inputs of each group of a layer's linears."""
    spec = skeleton.spec
    return [shapes[f"{spec.layers}.{index}.{g[0]}"][1] for g in spec.layer(index).groups]


def _vocabulary(inputs: RunInputs) -> int:
    """Bytes of the embedding or the head as they are made and written, and of a probe's logits."""
    skeleton, written, quantize = inputs.skeleton, inputs.dtype.itemsize, inputs.recipe.quantize
    rotated = inputs.recipe.rotate.kind != "none"
    vocabulary, hidden = skeleton.config.vocab_size, _hidden(inputs)
    table = vocabulary * hidden
    length = inputs.recipe.calibration.length if inputs.source.used else PROBE_TOKENS
    logits = min(length, scored_at_once(vocabulary)) * vocabulary * 4
    if quantize.head is not None:
        solved = quantize.method != "rtn" and (rotated or not skeleton.tied)
        copies = SOLVED_CODES if solved else ROUNDED_CODES
        head = table * copies + 4 * hidden**2 * SOLVER_COPIES * inputs.source.used
    else:
        head = table * written if rotated or not skeleton.tied else 0
    embedding = table * (written if quantize.embedding is None else ROUNDED_CODES)
    return max(embedding, head + logits) + _piece(inputs)


def _piece(inputs: RunInputs) -> int:
    """Bytes of the rows of a table that are read and turned, or multiplied, at a time."""
    table = inputs.skeleton.config.vocab_size * _hidden(inputs)
    rotated, stored = inputs.recipe.rotate.kind != "none", inputs.skeleton.dtype.itemsize
    most = WEIGHTS_AT_A_TIME["cpu"] if inputs.recipe.quantize.has_tables else VALUES_AT_ONCE
    return min(table, most) * (TURNED_PIECE if rotated else stored + 4)


def _working(length: int, skeleton: Skeleton, inside: Linears) -> int:
    """A batch in flight, or a linear being solved at several widths."""
    widest = max(K for _, K in inside)
    tokens = max(TOKENS_PER_BATCH, length)
    batch = tokens * (skeleton.config.hidden_size + 3 * widest) * 4
    weights = max(N * K for N, K in inside)
    return max(batch, 4 * (SOLVER_COPIES * widest**2 + LINEAR_COPIES * weights))
