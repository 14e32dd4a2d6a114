"""What a plan says in words: problems that would stop the run, and notes on what it will do.

problems = find_problems(inputs, names, shapes, schemes, pruned)
notes = ignored_notes(inputs, names) + token_notes(inputs, shapes, schemes)
"""

import math
from pathlib import Path

from compress.checkpoint.engines import Schemes, plan_notes
from compress.data.prompts import IMAGES_ALL_COUNT
from compress.data.text import locate
from compress.errors import CompressError, did_you_mean
from compress.eval.report import format_bytes
from compress.eval.settings import WINDOW
from compress.models.families import experts_of
from compress.models.skeleton import Skeleton
from compress.models.stored import said_packed
from compress.pipeline.inputs import RunInputs
from compress.pipeline.memory_forecast import FIXED_MEMORY, second_hessians
from compress.recipe.quantize import AUTO_SIZES, Experts
from compress.recipe.sections import MEASURED_SCORES, matches
from compress.rotation.model import unrotatable
from compress.rotation.rotate import head_rotation_skipped
from compress.scheme import PlannedModule, Scheme

WHOLE_BYTE = 8  # bits
LISTED = 8  # linears that a pattern's note names; `Plan.ignored` has them all


def find_problems(
    inputs: RunInputs,
    names: list[str],
    shapes: dict[str, tuple[int, int]],
    schemes: dict[str, Scheme | None],
    pruned: bool,
) -> list[str]:
    """A line for each thing that would make the run fail: its place in the recipe, and what to do.

    Args:
        names: every linear of the source.
        shapes, schemes: of each, by its name; None: stays unquantised.
        pruned: whether visual tokens are left out.
    """
    recipe, skeleton, source = inputs.recipe, inputs.skeleton, inputs.source
    problems = []
    if unknown := skeleton.left.unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        problems.append(
            f"{skeleton.folder}: {skeleton.reader.entry(unknown[0]).file.name} holds "
            f"{skeleton.reader.written_name(unknown[0])!r}{more}, which belongs to no part of the "
            f"model that config.json describes: correct config.json, or leave such tensors out"
        )
    problems += _family_problems(inputs)
    problems += _expert_problems(inputs, schemes)
    for pattern in recipe.quantize.unmatched(names):
        problems.append(
            f"quantize: {pattern!r} matches no linear of this model{did_you_mean(pattern, names)}"
        )
    if recipe.quantize.method == "gptq":
        weighable = _weighable(inputs, schemes)
        for pattern in recipe.quantize.token_importance.modules or ():
            if not any(matches(pattern, name) for name in weighable):
                problems.append(
                    f"quantize.token_importance.modules: {pattern!r} matches no quantised linear "
                    f"of a decoder layer{did_you_mean(pattern, weighable)}"
                )
    problems += _group_size_problems(inputs, shapes, schemes)
    for table in (recipe.quantize.embedding, recipe.quantize.head):
        if table and table.bits != WHOLE_BYTE and recipe.save.table_format == "int-quantized":
            problems.append(
                f"save.table_format: int-quantized takes a byte for a code, expected 8 bits, found "
                f"{table.bits}: use pack-quantized"
            )
            break
    none = not any(schemes.values()) and recipe.quantize.embedding is None
    if recipe.quantize.method != "none" and none:
        problems.append("quantize: every linear is ignored; method none would say so")
    context = getattr(skeleton.config, "max_position_embeddings", None)
    images = source.used and source.images
    if images and recipe.reads_windows:
        problems.append(
            "allocate: these scores are measured on text, and calibration.dataset holds prompts "
            "with images: name a text, or use outlier_weight_count or position"
        )
    if images and recipe.calibration.loss_mask != "all":
        problems.append(IMAGES_ALL_COUNT)
    if images and skeleton.absent:
        try:
            skeleton.processor()
        except CompressError as error:
            problems.append(f"calibration.dataset: {error}")
    windows = source.used and not images
    if windows and context and recipe.calibration.length > context:
        problems.append(
            f"calibration.length: {recipe.calibration.length} tokens are more than the model's "
            f"context of {context}"
        )
    measured = recipe.evaluate.perplexity if recipe.evaluate else None
    if measured and measured.stride:
        window = (measured.length or min(WINDOW, context or WINDOW)) - measured.bos
        if measured.stride > window:
            problems.append(
                f"evaluate.perplexity.stride: {measured.stride} does not fit windows of {window} "
                f"text tokens: expected 1 to {window}"
            )
    if images and pruned and recipe.quantize.target.name == "full_precision":
        problems.append(
            "quantize.target: full_precision needs every token in both models, and visual tokens "
            "of the calibration prompts are pruned: use quantized, or calibrate on text"
        )
    return problems


def _family_problems(inputs: RunInputs) -> list[str]:
    """What the recipe asks for and the model's family cannot have."""
    recipe, skeleton, problems = inputs.recipe, inputs.skeleton, []
    kind, spec = skeleton.model_config.model_type, skeleton.spec
    if recipe.rotate.kind != "none" and (why := unrotatable(skeleton)):
        problems.append(why)
    if recipe.quantize.embedding is not None and spec.scaled_by_module:
        problems.append(
            f"quantize.embedding: the embedding of a {kind!r} multiplies its rows by a number, "
            f"which a quantised one would not: leave it out"
        )
    if recipe.quantize.target.name == "full_precision" and any(k.parallel for k in spec.kinds):
        problems.append(
            f"quantize.target: full_precision is not there for a {kind!r}, whose attention and MLP "
            f"read the same input: use quantized"
        )
    if recipe.quantize.experts != Experts() and not any(k.experts for k in spec.kinds):
        problems.append(f"quantize.experts: this {kind!r} has no experts: leave it out")
    scaled = any(k.experts and k.experts.names.scaled_input for k in spec.kinds)
    if recipe.quantize.experts.routing_weight and scaled:
        problems.append(
            f"quantize.experts.routing_weight: the router of a {kind!r} multiplies what experts "
            f"read, so their Hessians have its weights already: leave it out"
        )
    if recipe.allocate is not None and any(k.experts for k in spec.kinds):
        if recipe.allocate.method != "remove":
            problems.append(
                f"allocate: widths of their own are not there for a {kind!r}: transformers reads "
                f"one scheme for all experts"
            )
        elif recipe.allocate.importance.base in MEASURED_SCORES:
            problems.append(
                f"allocate.importance: {recipe.allocate.importance.base} is not measured on a "
                f"{kind!r}, whose experts read tokens of their own: use layer_embedding_change or "
                f"outlier_weight_count"
            )
    if recipe.quantize.target.name == "full_precision" and any(k.between for k in spec.kinds):
        problems.append(
            f"quantize.target: full_precision is not there for a {kind!r}, which has linears "
            f"inside attention: use quantized"
        )
    elif recipe.quantize.target.name == "full_precision" and any(k.experts for k in spec.kinds):
        problems.append(
            f"quantize.target: full_precision is not there for a {kind!r}, whose router sends "
            f"tokens elsewhere once it is quantised: use quantized"
        )
    return problems


def _expert_problems(inputs: RunInputs, schemes: dict[str, Scheme | None]) -> list[str]:
    """What transformers, which makes one tensor of a layer's experts, could not read."""
    spec = inputs.skeleton.spec
    experts = [
        f"{spec.layers}.{index}.{name}"
        for index in range(inputs.skeleton.num_layers)
        if (found := spec.layer(index).experts)
        for group in found.groups
        for name in group
    ]
    kinds = {schemes[name] for name in experts}
    if len(kinds) > 1:
        return [
            "quantize: transformers reads one scheme for all experts: give them all the same bits "
            "and group size in overrides"
        ]
    packed = any(schemes.values()) or inputs.recipe.quantize.embedding is not None
    names = experts_of(inputs.skeleton.model_config.model_type)
    if kinds == {None} and packed and names is not None and names.files is None:
        return [
            "quantize: transformers reads experts in 16 bits only where nothing else is packed: "
            "quantise them too, or nothing (method: none)"
        ]
    if any(scheme and not scheme.symmetric for scheme in kinds):
        return ["quantize.symmetric: transformers reads symmetric experts only: use true"]
    return []


def _group_size_problems(
    inputs: RunInputs, shapes: dict[str, tuple[int, int]], schemes: dict[str, Scheme | None]
) -> list[str]:
    """A line for each group size that does not divide the inputs of a linear or of a table."""
    problems = []
    misfits: dict[tuple[str, int, int], list[str]] = {}
    fitted = {name: (shapes[name][1], scheme) for name, scheme in schemes.items()}
    if table := inputs.recipe.quantize.embedding:
        hidden = inputs.skeleton.config.hidden_size
        fitted[inputs.skeleton.spec.embedding] = hidden, table.scheme(hidden)
    for name, (columns, scheme) in fitted.items():
        if scheme and scheme.group_size and columns % scheme.group_size:
            key = _group_size_key(inputs, name)
            misfits.setdefault((key, scheme.group_size, columns), []).append(name)
    for (key, size, columns), found in misfits.items():
        fitting = ["auto", *(str(s) for s in (256, 128, 64, 32, 16) if columns % s == 0)]
        give = "use" if "[" in key else "give --set"  # one key of a list cannot be set
        equals = " " if "[" in key else f" {key}="
        problems.append(
            f"{key}: {size} does not divide the {columns} inputs of {found[0]}"
            + (f" and {len(found) - 1} more" if len(found) > 1 else "")
            + f": {give}{equals}{' or '.join([*fitting, 'channel'])}"
        )
    return problems


def _group_size_key(inputs: RunInputs, name: str) -> str:
    """The key of the recipe that gives a linear or a table its group size."""
    section, spec = inputs.recipe.quantize, inputs.skeleton.spec
    if name == spec.embedding:
        return "quantize.embedding.group_size"
    if name == spec.head and section.head is not None:
        return "quantize.head.group_size"
    index = next((i for i, o in enumerate(section.overrides) if matches(o.match, name)), None)
    if index is None or section.overrides[index].group_size is None:
        return "quantize.group_size"
    return f"quantize.overrides[{index}].group_size"


def absence_notes(inputs: RunInputs) -> list[str]:
    """What a plan rests on that finds no weights: a line, and another if they are packed."""
    skeleton = inputs.skeleton
    if not skeleton.absent:
        return []
    dtype = str(skeleton.dtype).removeprefix("torch.")
    taken = [] if skeleton.said_dtype else [f"{dtype}, since it names no dtype"]
    taken += ["embedding and head as one tensor"] if skeleton.tied else []
    more = f"; taken: {', '.join(taken)}" if taken else ""
    notes = [
        f"{skeleton.folder} has no weights: this plan is made from config.json alone, and nothing "
        f"was checked against them{more}"
    ]
    if said := said_packed(skeleton.folder, skeleton.packing):
        notes.append(
            f"the model is {said}: a run has to start from a copy in 16 bits, which is planned here"
        )
    return notes


def ignored_notes(inputs: RunInputs, names: list[str]) -> list[str]:
    """A line for each pattern of `ignore`: how many linears it matches, and which."""
    notes = []
    for pattern, found in inputs.recipe.quantize.left_out(names).items():
        if found != [pattern]:
            shown = found if len(found) <= LISTED else [*found[: LISTED - 1], "...", found[-1]]
            count = f"{len(found)} of {len(names)} linears"
            notes.append(f"quantize.ignore: {pattern!r} matches {count}: {', '.join(shown)}")
    return notes


def _weighable(inputs: RunInputs, schemes: dict[str, Scheme | None]) -> list[str]:
    """The quantised linears, whose Hessians may have token weights."""
    spec = inputs.skeleton.spec
    kinds = (f"{spec.layers}.", spec.head)
    return [name for name, scheme in schemes.items() if scheme and name.startswith(kinds)]


def token_notes(
    inputs: RunInputs, shapes: dict[str, tuple[int, int]], schemes: dict[str, Scheme | None]
) -> list[str]:
    """How tokens are weighed, where a recipe asks for more than a strategy and its range."""
    section = inputs.recipe.quantize.token_importance
    if inputs.recipe.quantize.method != "gptq" or not section.options:
        return []
    options = ", ".join(f"{k} {v}" for k, v in section.options.items() if k != "modules")
    notes = [f"token_importance: {section.name}" + (f", {options}" if options else "")]
    if section.modules is not None:
        names = _weighable(inputs, schemes)
        chosen = sum(map(section.applies_to, names))
        notes.append(f"token_importance.modules: weights for {chosen} of {len(names)} linears")
        if more := second_hessians(inputs, shapes):
            notes[-1] += (
                f"; groups of a layer that share an input but not the weights: {len(more)}, "
                f"a second Hessian for each, at most {format_bytes(max(more))} at a time"
            )
    return notes


def group_size_notes(modules: list[PlannedModule]) -> list[str]:
    """What `group_size: auto` has chosen, where it is not one size for all; and whole rows."""
    found: dict[int | None, list[PlannedModule]] = {}
    for module in modules:
        found.setdefault(module.scheme.group_size, []).append(module)
    rows = found.pop(None, [])
    sizes = [f"{size} for {_linears(found[size])}" for size in AUTO_SIZES if size in found]
    notes = [f"quantize.group_size: auto is {', '.join(sizes)}"] if len(sizes) > 1 else []
    if rows:
        sizes = list(map(str, AUTO_SIZES))
        notes.append(
            f"quantize.group_size: auto is channel, one scale a row, for {_linears(rows)}: none of "
            f"{', '.join(sizes)} divides the {rows[0].shape[1]} inputs of {rows[0].name}"
        )
    return notes


def _linears(modules: list[PlannedModule]) -> str:
    return "1 linear" if len(modules) == 1 else f"{len(modules)} linears"


def untying_notes(
    skeleton: Skeleton,
    packed: dict[str, int],
    kept: dict[str, tuple[int, ...]],
    itemsize: int,
    rotated: bool,
) -> list[str]:
    """What a second table adds to the file; `packed` in bytes, `kept` in shapes."""
    head = f"{skeleton.spec.head}."
    added = sum(size for name, size in packed.items() if name.startswith(head))
    shapes = (shape for name, shape in kept.items() if name.startswith(head))
    added += sum(map(math.prod, shapes)) * itemsize
    once = "--set rotate=none" if rotated else "equal quantize.embedding and quantize.head"
    return [
        f"embedding and head share one tensor in this model; they will be untied, which adds "
        f"{format_bytes(added)} ({once} would keep one)"
    ]


def same_text_notes(inputs: RunInputs) -> list[str]:
    """Where the perplexity would be of the very text that is calibrated on."""
    section, source = inputs.recipe.evaluate, inputs.source
    if section is None or section.perplexity is None or not source.used:
        return []
    dataset = section.perplexity.dataset
    try:
        measured = Path(locate(dataset, inputs.recipe.resolve_path))
        calibrated = Path(source.location)
        same = measured.is_file() and measured.samefile(calibrated)
    except (CompressError, OSError):  # told where it is read
        return []
    if not same:
        return []
    return [
        f"perplexity is measured on {dataset}, which is calibrated on as well: it will look better "
        "than on other text (evaluate.perplexity.dataset)"
    ]


def evaluation_notes(inputs: RunInputs, weights: int, peak: int) -> list[str]:
    """What the evaluation behind a run takes, if that is more than the run's peak [bytes].

    On a CPU both models are in fp32, the compressed one about as large as its file, and the logits
    of a batch of the text are held of either, and once more while they are made; `weights`: bytes
    of the file.
    """
    section, skeleton = inputs.recipe.evaluate, inputs.skeleton
    if section is None or section.perplexity is None or inputs.device != "cpu":
        return []
    settings = section.settings(section.perplexity.dataset)
    length = settings.window(getattr(skeleton.config, "max_position_embeddings", None))
    windows = settings.text_batch_size
    if settings.tokens is not None:
        windows = min(windows, -(-settings.tokens // length))
    logits = 4 * length * skeleton.config.vocab_size  # of a window
    source = 4 * skeleton.reader.nbytes() // skeleton.dtype.itemsize if section.baseline else 0
    models = 2 if section.baseline else 1
    fixed = FIXED_MEMORY + source + weights
    taken, least = (fixed + (models + 1) * logits * each for each in (windows, 1))
    if taken <= peak:
        return []
    return [
        f"the evaluation behind the run takes more than it, about {format_bytes(taken)}: "
        f"{format_bytes(least)} with --set evaluate.batch_size=1"
    ]


def model_notes(inputs: RunInputs, schemes: Schemes, formats: dict[str, str]) -> list[str]:
    """What the files leave out or say wrongly, what is not rotated, and what engines make of it."""
    notes = []
    if inputs.skeleton.said_tied and not inputs.skeleton.tied:
        notes.append(
            "config.json says that embedding and head share one tensor, but the file has a head of "
            "its own, as transformers uses it: the head is kept, tie_word_embeddings becomes false"
        )
    if buffers := inputs.skeleton.left.buffers:
        more = f" and {len(buffers) - 1} more" if len(buffers) > 1 else ""
        notes.append(f"{buffers[0]}{more} left out: transformers computes such buffers itself")
    if unread := inputs.skeleton.left.unread:
        more = f" and {len(unread) - 1} more" if len(unread) > 1 else ""
        notes.append(
            f"{unread[0]}{more} left out: transformers does not read them (layers that predict "
            f"further tokens, mostly)"
        )
    rotate, skeleton = inputs.recipe.rotate, inputs.skeleton
    skipped = head_rotation_skipped(rotate.kind, skeleton.head_dim)
    if skipped:
        notes.append(skipped)
    kinds = [skeleton.spec.layer(index) for index in range(skeleton.num_layers)]
    if rotate.kind != "none" and not skipped and (fixed := sum(k.value is None for k in kinds)):
        notes.append(
            f"value heads not rotated in {fixed} of {len(kinds)} layers of this "
            f"{skeleton.model_config.model_type!r}: what they give is not handed on as it is"
        )
    mapless = sum(not kind.attends for kind in kinds)
    section = inputs.recipe.quantize
    looks = section.token_importance.name == "attention_concentration"
    if mapless and looks and section.method == "gptq":
        notes.append(
            f"token_importance: {mapless} of {len(kinds)} layers have no attention map (linear "
            f"attention, or a convolution): all their tokens weigh the same"
        )
    return notes + plan_notes(schemes, formats, skeleton.model_config.model_type)
