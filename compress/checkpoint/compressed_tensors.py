"""The compressed-tensors section of config.json, `pack-quantized`: written, and read.

`packed_formats` says what lies in the files. Every width from 2 to 8 bits and every mixture of them
is legal; transformers and vLLM read it (transformers: symmetric only, or one asymmetric scheme with
`CompressedTensorsConfig(dequantize=True)`).

    config["quantization_config"] = quantization_config({name: Scheme(3, 128)}, ["lm_head"])
    module_schemes(config["quantization_config"], [name]) == {name: Scheme(3, 128)}
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from compress.checkpoint.quantization_config import groups_of, has_act_order, strategy_of
from compress.scheme import Scheme

# The release whose layout this is. 3, 5, 6 and 7 bits were padded to 32 // b codes a word before
# the dense stream (vllm-project/compressed-tensors#732); older readers misread those widths.
LAYOUT_VERSION = "0.20.0"
PACKED, MIXED = "pack-quantized", "mixed-precision"  # of a section: of its groups, if they differ
EMBEDDING_CLASS = "Embedding"
EXPERTS = ".experts."  # in the name of an expert's linear
# transformers takes the first group with such a target, or with a class, as that of all experts.
EXPERTS_TARGET = r"re:.*\.experts\..*"


def quantization_config(
    modules: dict[str, Scheme],
    ignore: list[str],
    tables: Mapping[str, str] | None = None,
    embedding: str | None = None,
) -> dict:
    """The `quantization_config` section of config.json.

    modules: full module name -> scheme, for every quantised module. ignore: full names (or
    `re:PATTERN`) of all other linears, the head included. tables: the format of the embedding and
    the head, where they have sections of their own; all else is `pack-quantized`. embedding: its
    name; engines that build it without one find it by its class.

    Modules of one scheme share a config group. With a single scheme of linears its target is the
    class `Linear`, which relies on `ignore` being complete; with several, each group lists its
    modules by name, since engines take the first target that matches and a name wins over a class.
    """
    tables = tables or {}
    groups: dict[tuple[Scheme, str, bool], list[str]] = {}
    # Tables first: who goes by the first target that matches meets the name before a class.
    for name in sorted(modules, key=lambda name: name not in tables):
        kind = (modules[name], tables.get(name, PACKED), name in tables)
        groups.setdefault(kind, []).append(name)
        if name == embedding and kind[1] == PACKED:
            groups[kind].append(EMBEDDING_CLASS)
    alone = sum(not table for _, _, table in groups) == 1
    formats = {format for _, format, _ in groups}

    def targets(names: list[str], table: bool) -> list[str]:
        experts = len(groups) > 1 and any(EXPERTS in name for name in names)
        found = ["Linear"] if alone and not table else names
        return [EXPERTS_TARGET, *found] if experts else found

    return {
        "quant_method": "compressed-tensors",
        "version": LAYOUT_VERSION,
        "format": PACKED if formats == {PACKED} else MIXED,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": {
                "targets": targets(names, table),
                "format": format,
                "input_activations": None,
                "output_activations": None,
                "weights": _weight_arguments(scheme),
            }
            for i, ((scheme, format, table), names) in enumerate(groups.items())
        },
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
    }


def _weight_arguments(scheme: Scheme) -> dict:
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if scheme.group_size is None else "group",
        "group_size": scheme.group_size,
        "dynamic": False,
    }


def module_schemes(config: dict, names: Iterable[str]) -> dict[str, Scheme]:
    """The scheme of each linear in `names` that a `quantization_config` quantises.

    Reads what others wrote too. As in compressed-tensors, a name wins over a pattern, a pattern
    over a class name, of several patterns the first in the alphabet, of equal targets the last.
    Any class name but that of embeddings, which are named, is taken to mean every linear, `Linear`
    before others.
    """
    targets: dict[str, Scheme] = {}
    for group in groups_of(config):
        if group.get("weights") is not None:
            targets |= dict.fromkeys(group["targets"], _group_scheme(group))
    patterns = [(_pattern(target), targets[target]) for target in sorted(filter(_is_rule, targets))]
    classes = sorted(filter(_is_class, targets), key=lambda target: target != "Linear")
    anything = targets[classes[0]] if classes else None
    ignore = config.get("ignore") or []
    ignored = [_pattern(target) for target in ignore if _is_rule(target)]
    ignored_names = {*ignore}

    def scheme_of(name: str) -> Scheme | None:
        if name in ignored_names or any(pattern.match(name) for pattern in ignored):
            return None
        if name in targets:
            return targets[name]
        return next((found for pattern, found in patterns if pattern.match(name)), anything)

    return {name: scheme for name in names if (scheme := scheme_of(name)) is not None}


def _group_scheme(group: dict[str, Any]) -> Scheme:
    """The scheme of a config group; what it does not say is as compressed-tensors has it."""
    weights, inputs = group["weights"], group.get("input_activations")
    size = weights.get("group_size") or -1  # some write channel as -1, some as null
    return Scheme(
        weights.get("num_bits", 8),
        size if size > 0 else None,
        weights.get("symmetric", True),
        None if inputs is None else inputs.get("num_bits", 8),
        strategy_of(weights) == "tensor",
        has_act_order(weights),
    )


def _is_rule(target: str) -> bool:
    return target.startswith("re:")


def _pattern(rule: str) -> re.Pattern[str]:
    return re.compile(rule.removeprefix("re:"))


def _is_class(target: str) -> bool:
    named = not _is_rule(target) and "." not in target and target[:1].isupper()
    return named and target != EMBEDDING_CLASS
