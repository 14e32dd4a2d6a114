"""The compressed-tensors `pack-quantized` layout: what goes into the file, and into config.json.

For a linear layer with weight [N, K], width b and G = K / group_size groups (G = 1 for channel):

    weight_packed      [N, ceil(K*b/32)]  int32   codes + 2^(b-1), a dense bit stream along K
    weight_scale       [N, G]             float   weight = (code - zero point) * scale
    weight_zero_point  [ceil(N*b/32), G]  int32   only if asymmetric; packed like codes, along N
    weight_shape       [2]                int64   N, K

Codes and zero points are signed, in [-2^(b-1), 2^(b-1) - 1]. Every width from 2 to 8 bits and every
mixture of them is legal; transformers and vLLM read it (transformers: symmetric only, or one
asymmetric scheme with `CompressedTensorsConfig(dequantize=True)`).

    tensors = compress_module(codes, scale, None, bits=3)
    config["quantization_config"] = quantization_config({name: Scheme(3, 128)}, ["lm_head"])
"""

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from compress.checkpoint.quantization_config import groups_of, has_act_order, strategy_of
from compress.errors import CheckpointError
from compress.kernels.packing import pack_rows, unpack_rows
from compress.scheme import Scheme

# The release whose layout this is. 3, 5, 6 and 7 bits were padded to 32 // b codes a word before
# the dense stream (vllm-project/compressed-tensors#732); older readers misread those widths.
LAYOUT_VERSION = "0.20.0"
PACKED_SUFFIXES = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")


# ---- config.json --------------------------------------------------------------------------------


def quantization_config(modules: dict[str, Scheme], ignore: list[str]) -> dict:
    """The `quantization_config` section of config.json.

    modules: full module name -> scheme, for every quantised linear. ignore: full names (or
    `re:PATTERN`) of all other linears, the head included. Modules of one scheme share a config
    group. With a single scheme its target is the class `Linear`, which relies on `ignore` being
    complete; with several, each group lists its modules by name, since engines take the first
    target that matches and a name wins over a class.
    """
    groups: dict[Scheme, list[str]] = {}
    for name, scheme in modules.items():
        groups.setdefault(scheme, []).append(name)
    return {
        "quant_method": "compressed-tensors",
        "version": LAYOUT_VERSION,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": {
                "targets": ["Linear"] if len(groups) == 1 else names,
                "format": "pack-quantized",
                "input_activations": None,
                "output_activations": None,
                "weights": _weight_arguments(scheme),
            }
            for i, (scheme, names) in enumerate(groups.items())
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
    Any class name is taken to mean every linear, `Linear` before others.
    """
    targets: dict[str, Scheme] = {}
    for group in groups_of(config):
        if group.get("weights") is not None:
            scheme = _group_scheme(group)
            targets |= dict.fromkeys(group["targets"], scheme)
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
        return next((scheme for pattern, scheme in patterns if pattern.match(name)), anything)

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
    return not _is_rule(target) and "." not in target and target[:1].isupper()


def must_dequantize_on_load(config: dict) -> bool:
    """Whether transformers loads a `quantization_config` only with `dequantize=True`.

    That is so for asymmetric modules: transformers 5.23 with compressed-tensors 0.20 makes no room
    for their packed zero points otherwise. But `dequantize=True` applies the first group's scheme
    to every module, so asymmetric modules of several schemes do not load at all: CheckpointError.
    """
    groups = [g["weights"] for g in config.get("config_groups", {}).values() if g.get("weights")]
    if all(weights.get("symmetric", True) for weights in groups):
        return False
    if len(groups) > 1:
        raise CheckpointError(
            "transformers cannot load asymmetric modules of several widths or group sizes: "
            "serve this checkpoint with vLLM, or quantise with `symmetric: true`"
        )
    return True


# ---- tensors ------------------------------------------------------------------------------------


def compress_module(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int
) -> dict[str, Tensor]:
    """The tensors of one linear layer as they are stored.

    codes [N, K] signed integers, scale [N, G] float (its dtype is kept), zero_point [N, G] signed
    integers or None if symmetric. Raises ValueError if G does not divide K, or a code or zero
    point lies outside [-2^(bits-1), 2^(bits-1) - 1].
    """
    N, K = codes.shape
    G = scale.shape[1]
    if scale.shape[0] != N or K % G or (zero_point is not None and zero_point.shape != scale.shape):
        found = f"scale {tuple(scale.shape)}"
        found += "" if zero_point is None else f" and zero point {tuple(zero_point.shape)}"
        raise ValueError(f"codes [{N}, {K}] take one scale per row and group, found {found}")
    offset = 2 ** (bits - 1)
    tensors = {
        "weight_packed": pack_rows(codes.to(torch.int16) + offset, bits),
        "weight_scale": scale.contiguous(),
        "weight_shape": torch.tensor([N, K], dtype=torch.int64),
    }
    if zero_point is not None:
        packed = pack_rows(zero_point.T.to(torch.int16) + offset, bits)  # [G, ceil(N*bits/32)]
        tensors["weight_zero_point"] = packed.T.contiguous()
    return tensors


def decompress_module(tensors: dict[str, Tensor], bits: int, group_size: int | None) -> Tensor:
    """The weight [N, K] that the tensors of `compress_module` stand for, in the scale's dtype.

    Raises CheckpointError if the scales were not made for `group_size` (None for channel).
    """
    scale = tensors["weight_scale"]
    N, K = tensors["weight_shape"].tolist()
    G = scale.shape[1]
    if G * (group_size or K) != K:
        raise CheckpointError(
            f"a weight of {K} columns in groups of {group_size or K} takes {K // (group_size or K)}"
            f" scales a row, the checkpoint has {G}"
        )
    offset = 2 ** (bits - 1)
    weight = unpack_rows(tensors["weight_packed"], bits, K).to(scale.dtype).view(N, G, K // G)
    weight -= offset
    if "weight_zero_point" in tensors:
        zero_point = unpack_rows(tensors["weight_zero_point"].T, bits, N).T.to(scale.dtype)
        weight -= (zero_point - offset).unsqueeze(-1)
    weight *= scale.unsqueeze(-1)
    return weight.view(N, K)
