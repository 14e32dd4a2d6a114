"""Which engine loads what: the one table of what is known of vLLM, SGLang and transformers.

                             vLLM 0.33               SGLang 0.5      transformers 5.23
    compressed-tensors
        4 and 8 bits         yes                     yes             yes
        other widths         with `humming` kernels  no              yes
        groups of 32, 64,    yes                     yes             yes
        128 and whole rows
        other groups         symmetric, in fp16      no              yes
        asymmetric           yes                     not known       one scheme, dequantize=True
        parts that differ    no                      not known       yes
    GPTQ
        widths               symmetric 4 and 8 bits  not known       one scheme, in every layer
        parts that differ    no                      no              no
        quantised lm_head    yes                     yes             no

GPTQModel 7.7 runs groups of 16, 32, ..., 1024 and whole rows, each module's own by `dynamic`.
Parts: vLLM and SGLang run q/k/v, and gate/up, as one matrix, which has one scheme.

    plan_notes(plan.schemes), gptq_notes(modules), loading_table({3, 4}, True, 2, {64, 128})
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from compress.checkpoint.quantization_config import groups_of
from compress.errors import CheckpointError
from compress.kernels.codes import LEAST_GROUP
from compress.scheme import Scheme

OWN_WIDTHS = {4, 8}  # of vLLM 0.33 and SGLang, without further packages
OWN_SIZES = {32, 64, 128, None}  # of groups: Marlin's, which SGLang runs alone
GPTQMODEL_SIZES = {16, 32, 64, 128, 256, 512, 1024, None}
HEAD = "lm_head"
# The linears that engines run as one, by the name of that one.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}

Schemes = Mapping[str, Scheme | None]  # of linears by name; None: stays unquantised


# ---- what they go by ----------------------------------------------------------------------------


def fusions(schemes: Schemes) -> dict[str, tuple[str, ...]]:
    """The parts of each fused layer, by the name that an engine gives it."""
    found = {}
    for name in schemes:
        parent, _, leaf = name.rpartition(".")
        for fused, leaves in FUSED.items():
            parts = tuple(f"{parent}.{part}" for part in leaves)
            if leaf == leaves[0] and all(part in schemes for part in parts):
                found[f"{parent}.{fused}"] = parts
    return found


def split_fusions(schemes: Schemes) -> dict[str, tuple[str, ...]]:
    """Those whose parts differ in scheme: what fuses them cannot load the checkpoint."""
    return {
        name: parts
        for name, parts in fusions(schemes).items()
        if len({schemes[part] for part in parts}) > 1
    }


def place_in_layers(name: str) -> tuple[str, int, str] | None:
    """("model.layers", 3, "mlp.up_proj") of a module inside a numbered layer, else None."""
    match = re.fullmatch(r"(.*?)\.(\d+)\.(.*)", name)
    return (match[1], int(match[2]), match[3]) if match else None


def same_in_every_layer(schemes: Schemes) -> list[str] | None:
    """The quantised linears by their names inside a layer, if some linears are left out of each.

    It is how transformers is told about linears that stay unquantised. None if there are none, or
    if they are not the same in every layer.
    """
    quantised: dict[str, None] = {}
    left: set[str] = set()
    for name, scheme in schemes.items():
        inner = place[2] if (place := place_in_layers(name)) else name
        if scheme is not None:
            quantised[inner] = None
        elif place:
            left.add(inner)
    return list(quantised) if left and not left & quantised.keys() else None


# ---- compressed-tensors -------------------------------------------------------------------------


def plan_notes(schemes: Schemes) -> list[str]:
    """What a person should know before a run: a line for each engine that will want more."""
    notes = []
    found = {scheme for scheme in schemes.values() if scheme is not None}
    if any(not scheme.symmetric for scheme in found):
        notes.append(
            "asymmetric weights: vLLM loads them; transformers only with "
            "CompressedTensorsConfig(dequantize=True)"
            + (" and not with several widths or group sizes" if len(found) > 1 else "")
        )
    if odd := sorted({scheme.bits for scheme in found} - OWN_WIDTHS):
        widths = ", ".join(map(str, odd))
        notes.append(f"{widths}-bit weights: vLLM needs the `humming` package, SGLang has none")
    if sizes := _other_sizes(found, OWN_SIZES):
        notes.append(
            f"groups of {sizes}: vLLM runs them in fp16 and symmetric only, SGLang not at all; "
            f"both run 32, 64, 128 and channel"
        )
    if any(scheme.group_size is not None and scheme.group_size % LEAST_GROUP for scheme in found):
        notes.append(
            f"groups of no multiple of {LEAST_GROUP} inputs do not run packed here: load them with "
            f"packed=False, or --dense"
        )
    if split := split_fusions(schemes):
        parts = ", ".join(next(iter(split.values())))
        notes.append(f"{parts} differ in scheme; vLLM fuses them and will refuse")
    return notes


def _other_sizes(schemes: Iterable[Scheme], known: set[int | None]) -> str:
    """The group sizes that are not among the known ones, as a list; empty if all are."""
    sizes = {scheme.group_size for scheme in schemes} - known
    return ", ".join(map(str, sorted(filter(None, sizes))))


def loading_table(
    widths: set[int], symmetric: bool, schemes: int, sizes: set[int | None]
) -> list[tuple[str, str]]:
    """(engine, how it loads) a checkpoint of these widths and group sizes, in so many schemes."""
    if symmetric:
        transformers = "yes, on CPU too; weights become dense at the first forward"
    elif schemes == 1:
        transformers = "with `CompressedTensorsConfig(dequantize=True)`"
    else:
        transformers = "no: asymmetric and of several widths or group sizes"
    vllm = sglang = "yes"
    if widths - OWN_WIDTHS:
        vllm, sglang = "with the optional `humming` kernels (NVIDIA)", "no: 4 and 8 bits only"
    elif sizes - OWN_SIZES:
        sglang = "no: groups of 32, 64, 128 or one a row only"
        vllm = "with `--dtype float16`" if symmetric else sglang
    return [
        ("transformers, compressed-tensors >= 0.20", transformers),
        ("vLLM", vllm),
        ("SGLang", sglang),
    ]


def must_dequantize_on_load(section: dict[str, Any]) -> bool:
    """Whether transformers loads a `quantization_config` only with `dequantize=True`.

    That is so for asymmetric modules: transformers 5.23 with compressed-tensors 0.20 makes no room
    for their packed zero points otherwise. But `dequantize=True` applies the first group's scheme
    to every module, so asymmetric modules of several schemes do not load at all: CheckpointError.
    """
    weights = [group["weights"] for group in groups_of(section) if group.get("weights")]
    if all(arguments.get("symmetric", True) for arguments in weights):
        return False
    if len(weights) > 1:
        raise CheckpointError(
            "transformers cannot load asymmetric modules of several widths or group sizes: "
            "serve this checkpoint with vLLM, or quantise with `symmetric: true`"
        )
    return True


# ---- GPTQ ---------------------------------------------------------------------------------------


def gptq_notes(modules: Mapping[str, Scheme], plain: Sequence[str] = ()) -> list[str]:
    """One line for each known reader that will not load such a checkpoint as GPTQ.

    plain: the linears inside the decoder layers that are not quantised.
    """
    schemes: Schemes = {**modules, **dict.fromkeys(plain)}
    notes = []
    if split := split_fusions(schemes):
        first = next(iter(split))
        notes.append(f"vLLM and SGLang will not load this: the parts of {first} differ in width")
    elif any(s.bits not in OWN_WIDTHS or not s.symmetric for s in modules.values()):
        notes.append("vLLM will not load this: its GPTQ takes symmetric 4 and 8 bits only")
    if sizes := _other_sizes(modules.values(), GPTQMODEL_SIZES):
        notes.append(f"GPTQModel will not load this: it has no kernels for groups of {sizes}")
    inside = {scheme for name, scheme in modules.items() if name != HEAD}
    uneven = bool(plain) and not same_in_every_layer(schemes)
    if len(inside) > 1 or HEAD in modules or uneven:
        notes.append(
            "transformers will not load this (it takes one scheme for the same linears of every "
            "layer, and no quantised lm_head): use GPTQModel"
        )
    return notes
