"""The `quantization_config` of a config.json that anybody wrote: checked once, then asked about.

    section = checked_section(config, "out/config.json")
    is_packed(section), needs_own_reader(section)

Checked is what readers go by, in sections of compressed-tensors and of GPTQ: the type of every key,
regular expressions, a strategy without its group size. Keys that are not listed here say nothing
about the weights and may hold anything; sections of other methods are left to transformers.
"""

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from compress.errors import CheckpointError
from compress.kernels.activations import BITS as ACTIVATION_BITS
from compress.recipe.expressions import LONGEST_NAME, check_expression, check_patterns, compiled
from compress.recipe.sections import Patterns
from compress.recipe.source import FieldError, Source
from compress.scheme import Scheme
from compress.storage.files import read_json

METHODS = ("compressed-tensors", "gptq")
# Keys under which other methods list what they leave out.
LEFT_OUT = ("modules_to_not_convert", "llm_int8_skip_modules", "ignored_layers")
INTEGERS = ("pack-quantized", "int-quantized")  # formats of compressed-tensors that run packed
# Methods of old that say so by a flag: the only sections without a quant_method.
FLAGS = ("load_in_4bit", "load_in_8bit")


# ---- what may stand there -----------------------------------------------------------------------


def _check_rule(rule: str) -> str:
    check_expression(rule_pattern(rule), rule)
    return rule


def _check_group_size(size: int) -> int:
    if size < -1:
        raise ValueError(f"expected a number of inputs, or -1 for all of them, found {size}")
    return size


def _switch_or_name(value: Any) -> Any:
    if not isinstance(value, bool | str):
        raise ValueError(f"expected true, false or a name, found {json.dumps(value)}")
    return value


Name = Annotated[str, Field(max_length=LONGEST_NAME)]
Rule = Annotated[str, AfterValidator(_check_rule)]
Bits = Annotated[int, Field(ge=1, le=64)]
GroupSize = Annotated[int, AfterValidator(_check_group_size)]
SwitchOrName = Annotated[Any, AfterValidator(_switch_or_name)]


class _Part(BaseModel):
    """No value is taken for another: "32" and true are no numbers."""

    model_config = ConfigDict(strict=True, extra="allow")


class Arguments(_Part):
    """How weights or activations are rounded; the defaults are those of compressed-tensors."""

    num_bits: Bits = 8
    type: Name = "int"
    symmetric: bool = True
    strategy: Name | None = None
    group_size: GroupSize | None = None
    dynamic: SwitchOrName = False
    actorder: SwitchOrName | None = None

    @model_validator(mode="after")
    def _agree(self) -> "Arguments":
        grouped, size = self.strategy in ("group", "tensor_group"), self.group_size or -1
        if grouped and size < 1:
            raise FieldError(("group_size",), f"strategy {self.strategy} needs one, found none")
        if self.strategy in ("channel", "tensor") and size > 0:
            raise FieldError(("group_size",), f"{size}, but strategy is {self.strategy}")
        return self


class Group(_Part):
    """Modules of one scheme."""

    targets: Patterns
    format: Name | None = None
    weights: Arguments | None = None
    input_activations: Arguments | None = None
    output_activations: Arguments | None = None


class Sparsity(_Part):
    """Which weights are left out of the files."""

    format: Name | None = None


class Rotation(_Part):
    """Where a rotation is applied."""

    location: Name | None = None


class Rotations(_Part):
    """One rotation and its places."""

    apply: list[Rotation] = []


class Transforms(_Part):
    """Rotations, by name."""

    config_groups: dict[str, Rotations] | None = None


class CompressedTensors(_Part):
    """A section of compressed-tensors."""

    format: Name | None = None
    quantization_status: Name | None = None
    config_groups: dict[str, Group] | None = None
    ignore: Patterns | None = None
    kv_cache_scheme: dict[str, Any] | None = None
    sparsity_config: Sparsity | None = None
    transform_config: Transforms | None = None

    @field_validator("config_groups")
    @classmethod
    def _check_targets(cls, groups: dict[str, Group] | None) -> dict[str, Group] | None:
        check_patterns(target for group in (groups or {}).values() for target in group.targets)
        return groups

    @model_validator(mode="after")
    def _says_what_is_packed(self) -> "CompressedTensors":
        if self.format in INTEGERS and not self.config_groups:
            raise FieldError(("config_groups",), f"format {self.format} needs one, found none")
        for name, group in (self.config_groups or {}).items():
            if group.format in INTEGERS and group.weights is None:
                place = ("config_groups", name, "weights")
                raise FieldError(place, f"format {group.format} needs them, found none")
        return self


class Override(_Part):
    """What `dynamic` changes for the modules that a rule matches."""

    bits: Bits = 4
    group_size: GroupSize | None = None
    sym: bool | None = None
    desc_act: bool | None = None


class Gptq(_Part):
    """A section of GPTQ."""

    bits: Bits
    group_size: GroupSize | None = None
    sym: bool | None = None
    desc_act: bool | None = None
    format: Name | None = None
    checkpoint_format: Name | None = None
    pack_dtype: Name | None = None
    dynamic: dict[Rule, Override] | None = None

    @field_validator("dynamic")
    @classmethod
    def _check_rules(cls, rules: dict[str, Override] | None) -> dict[str, Override] | None:
        check_patterns(f"re:{rule_pattern(rule)}" for rule in rules or {})
        return rules


SCHEMAS: dict[str, type[BaseModel]] = {"compressed-tensors": CompressedTensors, "gptq": Gptq}


def rule_pattern(rule: str) -> str:
    """The regular expression of a key of GPTQ's `dynamic`."""
    return rule.removeprefix("+:").removeprefix("-:")


def gptq_scheme(section: dict[str, Any], name: str) -> Scheme | None:
    """How a GPTQ checkpoint stores a module, None where `dynamic` leaves it out."""
    keys = ("bits", "group_size", "sym", "desc_act")
    settings: dict[str, Any] = {key: section.get(key) for key in keys}
    for rule, override in (section.get("dynamic") or {}).items():
        if compiled(rule_pattern(rule)).match(name):
            if rule.startswith("-:"):
                return None
            settings |= {key: override[key] for key in settings if key in override}
            break
    size = settings["group_size"] or -1
    return Scheme(
        settings["bits"],
        size if size > 0 else None,
        settings["sym"] is not False,  # where a file says nothing, as its writers have it
        act_order=bool(settings["desc_act"]),
    )


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's config.json. CheckpointError if there is none, or it is no JSON object."""
    config = read_json(folder / "config.json")
    if config is None:
        raise CheckpointError(f"{folder} has no config.json: it is not a model folder")
    return config


def is_tied(config: dict[str, Any]) -> bool:
    """Whether a config.json says that the head is the embedding, at its top or in its text part.

    Where it says nothing, transformers has a default for each family: taken for no here.
    """
    text = config.get("text_config")
    parts = (config, text if isinstance(text, dict) else {})
    return any(part.get("tie_word_embeddings") for part in parts)


def checked_section(config: dict[str, Any], place: str | Path) -> dict[str, Any]:
    """`quantization_config` of a config.json, {} if it has none.

    A multimodal config may have it in its text part. Raises CheckpointError, one line that names
    `place` and the key, for values that say nothing a reader could go by.
    """
    text = config.get("text_config")
    section = config.get("quantization_config")
    if section is None and isinstance(text, dict):
        section = text.get("quantization_config")
    if section is None:
        return {}
    where = f"{place}: quantization_config"
    if not isinstance(section, dict):
        raise CheckpointError(f"{where}: expected a JSON object, found {json.dumps(section)[:60]}")
    _check_others(section, where)
    method = section.get("quant_method")
    if not section or (method is None and any(section.get(flag) for flag in FLAGS)):
        return section
    if not isinstance(method, str) or len(method) > LONGEST_NAME:
        raise CheckpointError(
            f"{where}: quant_method: expected a name such as {' or '.join(METHODS)}, found "
            f"{json.dumps(method)[:60]}"
        )
    schema = SCHEMAS.get(method)
    if schema is not None:
        try:
            schema.model_validate(section)
        except ValidationError as error:
            # [key] is what pydantic puts behind the name of a key that is itself at fault
            line = Source(section, {(): where}).one_line(error, schema).replace(".[key]", "")
            raise CheckpointError(line) from None
    return section


def _check_others(section: dict[str, Any], where: str) -> None:
    """The lists of any method that transformers matches as expressions, names for the most part."""
    for key in LEFT_OUT:
        names = section.get(key)
        try:
            check_patterns(f"re:{name}" for name in (names if isinstance(names, list) else ()))
        except ValueError as error:
            raise CheckpointError(f"{where}.{key}: {error}") from None


# ---- what it says -------------------------------------------------------------------------------


def groups_of(section: dict[str, Any]) -> list[dict[str, Any]]:
    """The config groups of a compressed-tensors section, none of others."""
    if section.get("quant_method", "compressed-tensors") != "compressed-tensors":
        return []
    return list((section.get("config_groups") or {}).values())


def format_of(section: dict[str, Any], group: dict[str, Any] | None = None) -> str:
    """The format of a section, or of one of its groups."""
    if section.get("quant_method") == "gptq":
        return str(section.get("checkpoint_format") or section.get("format") or "gptq")
    group = group or next(iter(groups_of(section)), {})
    return str(group.get("format") or section.get("format"))


def strategy_of(arguments: dict[str, Any]) -> str:
    """What shares a scale, which compressed-tensors infers where a file does not say it."""
    size = arguments.get("group_size")
    inferred = "tensor" if size is None else "group" if size > 0 else "channel"
    return arguments.get("strategy") or inferred


def has_act_order(arguments: dict[str, Any]) -> bool:
    """Whether inputs are permuted across groups: by the names that this had in the course of time.

    Act-order "weight" only decided in which order columns were quantised.
    """
    return arguments.get("actorder") in (True, "group", "dynamic")


def extras(section: dict[str, Any]) -> dict[str, bool]:
    """What a compressed-tensors section asks for beyond integer weights that share scales."""
    groups = groups_of(section)
    weights = [group.get("weights") or {} for group in groups]
    transforms = (section.get("transform_config") or {}).get("config_groups") or {}
    applied = [part for scheme in transforms.values() for part in scheme.get("apply", [])]
    sparse = (section.get("sparsity_config") or {}).get("format") or "dense"
    return {
        # rotations at weight_input and weight_output are folded into the weights already
        "online rotations": any(
            not str(part.get("location", "")).startswith("weight") for part in applied
        ),
        "a quantised KV cache": section.get("kv_cache_scheme") is not None,
        "sparse weights": sparse != "dense",
        "quantised activations other than integers with a scale for each token": any(
            not _as_they_are_or_by_token(group) for group in groups
        ),
        "weights other than integers in groups": any(
            w.get("type", "int") != "int" or strategy_of(w) not in ("group", "channel", "tensor")
            for w in weights
        ),
    }


def _as_they_are_or_by_token(group: dict[str, Any]) -> bool:
    inputs = group.get("input_activations")
    return group.get("output_activations") is None and (inputs is None or _by_token(inputs))


def _by_token(activations: dict[str, Any]) -> bool:
    """Whether inputs are rounded as `quantize_tokens` rounds them."""
    wanted = {"type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
    usual = {"type": "int", "symmetric": True, "dynamic": False}  # where a file says nothing
    found = {key: activations.get(key, usual.get(key)) for key in wanted}
    return found == wanted and activations.get("num_bits", 8) in ACTIVATION_BITS


def _is_decompressed(section: dict[str, Any]) -> bool:
    """Whether weights are dense again: transformers saves them so after a forward."""
    return section.get("quantization_status") == "decompressed"


def has_packed_table(section: dict[str, Any]) -> bool:
    """Whether an embedding is among what is packed in words."""
    return any(
        target == "Embedding" or target.rpartition(".")[2] == "embed_tokens"
        for group in groups_of(section)
        if format_of(section, group) == "pack-quantized"
        for target in group["targets"]
    )


def needs_own_reader(section: dict[str, Any]) -> bool:
    """Whether transformers alone does not load such weights as dense ones, and `codes` does.

    GPTQ, for which it wants two more packages; asymmetric compressed-tensors, of which it loads
    one scheme only; an embedding in words, for which it makes no room; and act-order, which
    compressed-tensors gave up in 0.19.
    """
    if section.get("quant_method") == "gptq":
        return True
    formats = {format_of(section, group) for group in groups_of(section)}
    if section.get("quant_method") != "compressed-tensors" or not formats <= {*INTEGERS}:
        return False
    if _is_decompressed(section):
        return False
    weights = [group["weights"] for group in groups_of(section) if group.get("weights")]
    asymmetric = not all(w.get("symmetric", True) for w in weights)
    packed_zeros = asymmetric and "pack-quantized" in formats
    return packed_zeros or has_packed_table(section) or any(has_act_order(w) for w in weights)


def is_packed(section: dict[str, Any]) -> bool:
    """Whether the section is of a format that `PackedLinears` reads and kernels run.

    Codes in int8 only where activations are rounded by token: of others nothing would be gained.
    """
    method, groups = section.get("quant_method"), groups_of(section)
    if method != "compressed-tensors":
        return method == "gptq"
    if _is_decompressed(section):
        return False
    formats = {format_of(section, group) for group in groups}
    if formats == {"int-quantized"}:
        inputs = [group.get("input_activations") for group in groups]
        return all(found is not None and _by_token(found) for found in inputs)
    return "pack-quantized" in formats and formats <= {*INTEGERS}
