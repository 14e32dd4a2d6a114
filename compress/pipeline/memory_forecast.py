"""What a run will need of the host's memory, at its peak, from the recipe and the headers alone.

host_memory(inputs, shapes)

The peak of resident memory of the process that runs, shared libraries included, as
`modelpress.json` and `bench quantize` give it (VmHWM on Linux), to 10 %: the fixed cost of Python,
torch and transformers, the activations of all calibration windows unless they go to disk, and the
most of

    a layer as it is read and in fp32, and a group of its linears being solved or a batch in flight;
        of its experts one at a time, and what is written of all of them
    the embedding or the head as it is stored and in fp32, and the logits of a probe
    what the scores of `allocate` need

With `quantize.target: full_precision` the 16-bit model's activations between layers come on top,
two more statistics of the widest linear's input, and the 16-bit weights of a group while its
outputs are taken.

While windows are drawn the tokens of the whole text are held, 8 bytes each, which no header
foretells: of a small model and a long text that may be more.

Two processes of their own are not in it. That of the source check holds a module at a time; that
of the self-check has the whole model in fp32, as whoever loads it in transformers has. Evaluation
comes after the peak and loads the result.
"""

import math

from compress.data.activations import TOKENS_PER_BATCH, activations_on_disk
from compress.data.windows import PROBE_TOKENS
from compress.eval.windows import CHUNK_ELEMENTS, scored_at_once
from compress.models.skeleton import Skeleton
from compress.pipeline.inputs import RunInputs
from compress.pipeline.pruning_forecast import calibration_tokens
from compress.recipe.sections import MEASURED_SCORES
from compress.rotation.rotate import VALUES_AT_ONCE

Shapes = dict[str, tuple[int, int]]  # of linears, by full name

# Python, torch, transformers and what a run imports on its way: 460 to 490 MiB on Linux with CPU
# torch 2.13, of which 180 MiB are shared libraries.
FIXED_MEMORY = 505 * 10**6
# The tokenizer and what reading a text leaves behind, measured on 8 windows of `python-stdlib`.
TEXT_MEMORY = 130 * 10**6
SOLVER_COPIES = 3  # of a Hessian while it is factored; as many of a group's weights
LOGIT_COPIES = 8  # of a chunk of logits while a divergence is taken of two of them


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
    reads_text = inputs.source.used and not inputs.source.images
    fixed = FIXED_MEMORY + (TEXT_MEMORY if reads_text else 0)
    return fixed + max(_run(inputs, shapes), _scores(inputs, shapes))


def _run(inputs: RunInputs, shapes: Shapes) -> int:
    """Of the walk that rotates and quantises."""
    recipe, skeleton = inputs.recipe, inputs.skeleton
    bytes_per_weight = 4 + (16 if recipe.rotate.kind != "none" else skeleton.dtype.itemsize)
    vocabulary = _vocabulary(inputs)
    # The vision tower encodes in fp32, beside its tensors as they are written.
    tower = sum(skeleton.model.get_parameter(name).numel() for name in skeleton.vision_names())
    seeing = tower * (4 + skeleton.dtype.itemsize) + (vocabulary if tower else 0)
    walk = 0
    for index in range(skeleton.num_layers):
        inside = _at_once(skeleton, shapes, index)
        layer = sum(N * K for N, K in inside) * bytes_per_weight
        layer += _of_experts(inputs, shapes, index)
        if inputs.source.used:
            twin = recipe.quantize.target.name == "full_precision"
            layer += _working(recipe.calibration.length, skeleton, inside, twin)
        walk = max(walk, layer)
    if inputs.source.used:
        walk += max(second_hessians(inputs, shapes), default=0)
    elif recipe.quantize.method != "none":
        walk += _stack(skeleton, shapes) * (4 + 1)  # in fp32, and its codes
    total = max(walk, vocabulary, seeing)
    pruning = recipe.prune_visual_tokens
    if pruning is not None and pruning.search is not None:
        total = max(total, skeleton.reader.nbytes())
    if not inputs.source.used:
        return total
    layers = range(skeleton.num_layers)
    widest = max(_waiting(skeleton, shapes, index) for index in layers)
    hidden = skeleton.config.hidden_size
    twin = recipe.quantize.target.name == "full_precision"
    streams = hidden * (2 if twin else 1) + widest
    activations = calibration_tokens(inputs.source, skeleton) * streams * 4
    on_disk = activations_on_disk(recipe.calibration.offload, activations)
    return total + (0 if on_disk else activations) + _added(inputs)


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
    stored = states * (1 + (units * len(section.widths) if diverging else 0))
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
    head = _vocabulary(inputs) + chunk * LOGIT_COPIES
    if section.method == "evolve":  # the windows before, after the 16-bit model, and after another
        return max(walk, head + max(3 * states, stored if diverging else 0))
    return max(walk, head + stored if diverging else 0)


def _inside(skeleton: Skeleton, shapes: Shapes) -> list[tuple[int, int]]:
    """The linears that are in memory together, of the layer that has most weights."""
    layers = [_at_once(skeleton, shapes, index) for index in range(skeleton.num_layers)]
    return max(layers, key=lambda linears: sum(N * K for N, K in linears))


def _at_once(skeleton: Skeleton, shapes: Shapes, index: int) -> list[tuple[int, int]]:
    """The linears of a layer that are in memory together: all but its experts, and one of these."""
    kind, prefix = skeleton.spec.layer(index), f"{skeleton.spec.layers}.{index}."
    alone = (*kind.experts.inner(0), kind.experts.outer(0)) if kind.experts else ()
    return [shapes[prefix + name] for name in (*kind.resting.linears, *alone)]


def _waiting(skeleton: Skeleton, shapes: Shapes, index: int) -> int:
    """The width of what waits in a layer between two of its stages, beside its input."""
    kind, prefix = skeleton.spec.layer(index), f"{skeleton.spec.layers}.{index}."
    if kind.experts is None:
        return max(K for _, K in _at_once(skeleton, shapes, index))
    return max(skeleton.config.hidden_size, shapes[prefix + kind.output][1])


def _of_experts(inputs: RunInputs, shapes: Shapes, index: int) -> int:
    """Bytes of what a layer has for all of its experts while one of them is at work.

    What is written of each, which of those in 16 bits is one tensor at the end where files have it
    so; where each token goes; and Hessians that experts share.
    """
    recipe, skeleton = inputs.recipe, inputs.skeleton
    kind, prefix = skeleton.spec.layer(index), f"{skeleton.spec.layers}.{index}."
    experts = kind.experts
    if experts is None:
        return 0
    itemsize, written, columns = inputs.dtype.itemsize, 0.0, set()
    for name in (*experts.inner(0), experts.outer(0)):
        N, K = shapes[prefix + name]
        columns.add(K)
        scheme = recipe.quantize.scheme_for(prefix + name, K)
        if scheme is None:
            written += N * K * itemsize * (2 if skeleton.wholes else 1)
        else:
            written += N * (K * scheme.bits / 8 + K // (scheme.group_size or K) * itemsize)
    total = round(experts.count * written)
    if inputs.source.used:
        chosen = getattr(skeleton.config, "num_experts_per_tok", None) or 1
        total += calibration_tokens(inputs.source, skeleton) * chosen * (8 + 4)
        if recipe.quantize.experts.policy == "shared_hessian":
            total += sum(4 * K**2 for K in columns)
    return total


def _columns(skeleton: Skeleton, shapes: Shapes, index: int) -> list[int]:
    """The inputs of each group of a layer's linears."""
    spec = skeleton.spec
    return [shapes[f"{spec.layers}.{index}.{g[0]}"][1] for g in spec.layer(index).groups]


def _stack(skeleton: Skeleton, shapes: Shapes) -> int:
    """The weights of the largest group of linears, which are solved as one stack of rows."""
    spec = skeleton.spec
    return max(
        sum(math.prod(shapes[f"{spec.layers}.{i}.{name}"]) for name in group)
        for i in range(skeleton.num_layers)
        for group in spec.layer(i).groups
    )


def _vocabulary(inputs: RunInputs) -> int:
    """Bytes of the embedding or the head as it is stored and in fp32, and of a probe's logits."""
    skeleton, stored = inputs.skeleton, inputs.skeleton.dtype.itemsize
    rotated = inputs.recipe.rotate.kind != "none"
    copied = stored < 4 or rotated
    vocabulary = skeleton.config.vocab_size
    length = inputs.recipe.calibration.length if inputs.source.used else PROBE_TOKENS
    logits = min(length, scored_at_once(vocabulary)) * vocabulary * 4
    # Its codes, on their way to words or bytes; and of a head that is solved, what it became.
    quantize = inputs.recipe.quantize
    rounded = 4 * quantize.has_tables + 4 * (quantize.head is not None)
    table = vocabulary * skeleton.config.hidden_size
    pieces = 3 * 8 * min(table, VALUES_AT_ONCE) * rotated  # in fp64
    return table * (4 + stored * copied + rounded) + logits + pieces


def _working(
    length: int, skeleton: Skeleton, inside: list[tuple[int, int]], twin: bool = False
) -> int:
    """A batch in flight, or a linear being solved; `twin`: with the 16-bit model's beside it."""
    widest = max(K for _, K in inside)
    tokens = max(TOKENS_PER_BATCH, length)
    batch = tokens * (skeleton.config.hidden_size + 3 * widest) * 4
    weights = max(N * K for N, K in inside)
    solver = SOLVER_COPIES * 4 * (widest**2 + weights)
    if twin:  # x0 and x0 - x; H, D and F; gate and up as they were
        batch += tokens * (skeleton.config.hidden_size + 2 * widest) * 4
        batch += 3 * 4 * widest**2 + 2 * 4 * weights
        solver += 4 * weights  # W D
    return max(batch, solver)
