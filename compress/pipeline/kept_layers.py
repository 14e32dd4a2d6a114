"""The config of a model some of whose decoder layers were left out.

What the keys of config.json say of each layer, by a list, by layer numbers or by a rule, is said of
those that are kept.

    shorten(decoder, skeleton, layers)              # the decoder's part of config.json, in place
    problems = kept_problems(skeleton, layers)      # where no config describes them
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from compress.models.config_values import reason_of
from compress.models.skeleton import Skeleton, empty_model

# Lists with a value for each layer; some may be one number for all.
PER_LAYER = (
    "layer_types",
    "mlp_layer_types",
    "no_rope_layers",
    "moe_layer_freq",
    "moe_topk",
    "moe_intermediate_size",
    "num_experts",
    "num_experts_per_tok",
    "num_shared_expert",
    "num_shared_experts",
)
NUMBERED = ("moe_layers", "full_attn_idxs")  # lists of layer numbers
LEADING = ("first_k_dense_replace", "num_dense_layers")  # how many are dense before all others
# Of every so many layers the last is another one than the rest: the key, the list that transformers
# derives from it, and what that has for the last. Where it has the list it does not go by the key.
PERIODS = (
    ("sliding_window_pattern", "layer_types", "full_attention"),
    ("_sliding_window_pattern", "layer_types", "full_attention"),
    ("full_attention_interval", "layer_types", "full_attention"),
    ("no_rope_layer_interval", "no_rope_layers", 0),
)
SCALARS = (bool, int, float, str, type(None))


def shorten(decoder: dict[str, Any], skeleton: Skeleton, layers: Sequence[int]) -> None:
    """Makes the keys of `decoder` say of the source's layers `layers` what they said of all."""
    config, total = skeleton.config, skeleton.num_layers
    sparse = [skeleton.spec.layer(index).experts is not None for index in layers]

    def said(key: str) -> Any:
        # As transformers reads it: an older file derives it from the depth.
        value = getattr(config, key, None)
        return decoder.get(key) if value is None else value

    def say(key: str, value: Any) -> None:
        if said(key) != value:
            decoder[key] = value

    decoder["num_hidden_layers"] = len(layers)
    for key in PER_LAYER:
        if key in config.attribute_map and key not in decoder:
            continue  # another name of a key
        values = said(key)
        if isinstance(values, list | tuple) and len(values) == total:
            decoder[key] = [values[index] for index in layers]
    for key in NUMBERED:
        if isinstance(numbers := said(key), list | tuple):
            decoder[key] = [new for new, index in enumerate(layers) if index in numbers]
    for key in LEADING:
        if isinstance(said(key), int):
            say(key, [*sparse, True].index(True))
    if said("mlp_only_layers") is not None:
        say("decoder_sparse_step", 1)
        say("mlp_only_layers", [new for new, found in enumerate(sparse) if not found])
    if said("moe_layer_interval") is not None:
        _between(say, sparse)
    if "interleave_moe_layer_step" in decoder:
        _every(decoder, "interleave_moe_layer_step", sparse)
    for key, name, last in PERIODS:
        if key in decoder and name in decoder:
            _every(decoder, key, [value == last for value in decoder[name]])


def _every(decoder: dict[str, Any], key: str, marks: list[bool]) -> None:
    """Makes the key the period of the marks; without one it goes, and the list alone says them."""
    if _marked(marks, decoder[key], 0, len(marks) - 1):
        return
    decoder[key] = _period(marks, 0, len(marks) - 1)
    if decoder[key] is None:
        del decoder[key]


def _between(say: Callable[[str, Any], None], sparse: list[bool]) -> None:
    """The rule of which layers have experts by a first, a last and a step."""
    numbers = [number for number, found in enumerate(sparse) if found]
    first, last = (numbers[0], numbers[-1]) if numbers else (len(sparse), len(sparse))
    if (step := _period(sparse, first, last)) is not None:
        say("moe_layer_start_index", first)
        say("moe_layer_end_index", last)
        say("moe_layer_interval", step)


def _marked(marks: list[bool], step: Any, first: int, last: int) -> bool:
    """Whether those from `first` to `last` whose number from 1 divides by `step` are the marks."""
    if not isinstance(step, int) or step < 1:
        return False
    numbers = range(len(marks))
    return marks == [first <= number <= last and (number + 1) % step == 0 for number in numbers]


def _period(marks: list[bool], first: int, last: int) -> int | None:
    steps = range(1, len(marks) + 2)  # the last of them: none
    return next((step for step in steps if _marked(marks, step, first, last)), None)


def kept_problems(skeleton: Skeleton, layers: Sequence[int]) -> list[str]:
    """A line where the model of the shortened config has other layers than those of the source."""
    gone = sorted({*range(skeleton.num_layers)} - {*layers})
    if not gone or (why := _unlike(skeleton, layers)) is None:
        return []
    kind, numbers = skeleton.model_config.model_type, ", ".join(map(str, gone))
    return [
        f"allocate.method: no config.json of a {kind!r} says what remove leaves without layers "
        f"{numbers} ({why}): use another allocate.narrow, importance or method"
    ]


def _unlike(skeleton: Skeleton, layers: Sequence[int]) -> str | None:
    """What the shortened config does not describe as it is."""
    values = json.loads((skeleton.folder / "config.json").read_text())
    values.pop("quantization_config", None)
    shorten(values.get("text_config", values), skeleton, layers)
    try:
        config = type(skeleton.model_config).from_dict(values)
        model = empty_model(config, skeleton.spec.vision is not None)
    except Exception as error:  # what values that do not go together set off is of any kind
        return f"it would describe no model: {reason_of(error)}"
    inside = (skeleton.spec.layers, config.get_text_config())
    before = (skeleton.spec.layers, skeleton.config)
    found, kept = _layers(model, *inside), _layers(skeleton.model, *before)
    if len(found) != len(layers):
        return f"it would describe {len(found)} layers"
    unlike = (old for new, old in enumerate(layers) if found[new] != kept[old])
    first = next(unlike, None)
    return None if first is None else f"layer {first} would be of another kind"


def _layers(model: nn.Module, place: str, config: Any) -> list[tuple[object, dict[str, Any]]]:
    """What each decoder layer is, and of which type."""
    built = [_built(layer) for layer in model.get_submodule(place).children()]
    types = [*(getattr(config, "layer_types", None) or ()), *[None] * len(built)]
    return list(zip(types, built, strict=False))


def _built(layer: nn.Module) -> dict[str, Any]:
    """What a layer is: the shapes of its parameters, and the settings of its modules."""
    unlike = {"layer_idx", *(key for key, _, _ in PERIODS)}  # which layers may not share
    built: dict[str, Any] = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    for name, module in layer.named_modules():
        built[f"{name} class"] = type(module).__name__  # of experts, each has its own
        for key, value in vars(module).items():
            if key not in unlike and isinstance(value, SCALARS):
                built[f"{name} {key}"] = value
    return built
