"""Export to the GPTQ format: the weights, and what config.json says about them.

`packed_formats.Gptq` says what lies in the files. Version 1 (`gptq`) stores each zero point less
one. Readers disagree about what a zero point of 0 then becomes, so only symmetric layers, whose
zero point is 2^(b-1), are written as version 1; one asymmetric layer makes the whole checkpoint
version 2 (`gptq_v2`), which stores zero points as they are.

Layers of other widths or group sizes than most, and layers left unquantised, are named by regular
expressions in `dynamic`. GPTQModel matches them against the names in the file; vLLM and SGLang
against the name of the one layer into which they fuse q/k/v and gate/up. Both spellings are given.

    section = quantization_config({"model.layers.0.mlp.up_proj": Scheme(3, 128)}, plain=[])
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.checkpoint.engines import (
    HEAD,
    Schemes,
    fusions,
    gptq_notes,
    place_in_layers,
    same_in_every_layer,
)
from compress.checkpoint.packed import EMBEDDING, PackedLinears
from compress.checkpoint.packed_formats import FORMATS, with_fp16_scales
from compress.errors import UsageError
from compress.kernels.reference import dense
from compress.scheme import Scheme
from compress.storage.files import write_json
from compress.storage.safetensors import merge_shards, save_tensors

MULTIPLE = 32  # of inputs and outputs: what GPTQModel packs and what kernels run
PART_BYTES = 256 * 10**6  # written at a time, before parts become shards


# ---- config.json --------------------------------------------------------------------------------


def written_format(modules: dict[str, Scheme]) -> str:
    """The row of FORMATS that holds the modules: version 1 if every one is symmetric, else 2."""
    return "gptq" if all(scheme.symmetric for scheme in modules.values()) else "gptq_v2"


def quantization_config(
    modules: dict[str, Scheme],
    plain: Sequence[str] = (),
    weights: dict[str, int] | None = None,
) -> dict[str, Any]:
    """The `quantization_config` section of config.json, which is also quantize_config.json.

    modules: full name -> scheme, for every quantised linear. plain: the linears inside the decoder
    layers that are not quantised. weights: how many weights each module has; the scheme of most of
    them is the one that needs no rule in `dynamic`.
    """
    base = _most_common(modules, weights or {})
    written = written_format(modules)
    config = {
        "quant_method": "gptq",
        "method": "gptq",
        "checkpoint_format": written,
        "format": written,
        **_settings(base),
        "desc_act": False,
        "lm_head": HEAD in modules,
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"modelpress:{version('modelpress')}"]},
    }
    schemes: Schemes = modules | dict.fromkeys(plain)
    if rules := _dynamic(schemes, base):
        config["dynamic"] = rules
    if same := same_in_every_layer(schemes):
        config["modules_in_block_to_quantize"] = [same]
    return config


def _settings(scheme: Scheme) -> dict[str, Any]:
    size = -1 if scheme.group_size is None else scheme.group_size
    return {"bits": scheme.bits, "group_size": size, "sym": scheme.symmetric}


def _most_common(modules: dict[str, Scheme], weights: dict[str, int]) -> Scheme:
    """The scheme of most weights inside the layers; of two with as many, the one met first."""
    inside = [name for name in modules if name != HEAD] or list(modules)
    share: dict[Scheme, int] = {}
    for name in inside:
        share[modules[name]] = share.get(modules[name], 0) + weights.get(name, 1)
    return max(share, key=lambda scheme: share[scheme])


def _dynamic(schemes: Schemes, base: Scheme) -> dict[str, dict[str, Any]]:
    """Patterns of the modules that `base` does not describe -> what describes them.

    No name matches two patterns, so it does not matter that readers differ in which one they try
    first. A pattern is anchored at both ends: readers anchor it at the start only.
    """
    spelled = dict(schemes)
    for name, parts in fusions(schemes).items():
        found = {schemes[part] for part in parts}
        if len(found) == 1:
            (spelled[name],) = found
    others: dict[Scheme | None, list[str]] = {}
    for name, scheme in spelled.items():
        if scheme != base and (scheme is not None or name != HEAD):
            others.setdefault(scheme, []).append(name)
    rules = {}
    for scheme, names in others.items():
        for pattern in _patterns(names, spelled):
            rules["-:" + pattern if scheme is None else pattern] = (
                {} if scheme is None else _settings(scheme)
            )
    return rules


def _patterns(names: list[str], known: Iterable[str]) -> list[str]:
    """Regular expressions that together match `names`, and no other name in `known`.

    Layers are numbered: names that differ in the number only share a pattern, and so do names
    inside the layer that are there for the same numbers.
    """
    numbers: dict[tuple[str, str], list[int]] = {}
    every: dict[tuple[str, str], set[int]] = {}
    patterns = []
    for name in known:
        if part := place_in_layers(name):
            every.setdefault(part[::2], set()).add(part[1])
    for name in names:
        if part := place_in_layers(name):
            numbers.setdefault(part[::2], []).append(part[1])
        else:
            patterns.append(f"^{re.escape(name)}$")
    shared: dict[tuple[str, str], list[str]] = {}
    for (stack, inner), found in numbers.items():
        listed = "|".join(map(str, sorted(found)))
        layers = r"\d+" if set(found) == every[stack, inner] else f"(?:{listed})"
        shared.setdefault((stack, layers), []).append(inner)
    for (stack, layers), names in shared.items():
        listed = "|".join(re.escape(name) for name in sorted(names))
        patterns.append(rf"^{re.escape(stack)}\.{layers}\.(?:{listed})$")
    return patterns


# ---- the format, as `export` uses it ------------------------------------------------------------


class GptqFormat:
    """Writes a packed checkpoint as GPTQ."""

    name = "gptq"
    companions = True  # tokenizer and generation settings lie beside the weights
    options: frozenset[str] = frozenset()

    def __init__(self, source: PackedLinears):
        self.source = source
        # A packed embedding becomes dense again, and with it the head that is the same table.
        self.tables = {n for n in source.schemes if n.rpartition(".")[2] == EMBEDDING}
        dense = {*self.tables, *source.twins}
        self.schemes = {name: s for name, s in source.schemes.items() if name not in dense}
        self.format = FORMATS[written_format(self.schemes)]
        matrices = [
            name.removesuffix(".weight")
            for name in source.reader.names
            if name.endswith(".weight") and len(source.reader.shape(name)) == 2
        ]
        self.plain = [n for n in matrices if n not in self.schemes and place_in_layers(n)]

    def check(self) -> list[str]:
        """What readers will not load; UsageError for what the format itself cannot hold."""
        if "vision_config" in self.source.config:
            raise UsageError(
                "GPTQ export knows language models alone, this one sees images: keep "
                "compressed-tensors"
            )
        for name, scheme in self.schemes.items():
            N, K = self.source.shapes[name]
            if scheme.bits not in self.format.widths:
                raise UsageError(
                    f"GPTQ holds 2, 3, 4 and 8 bits, {name} has {scheme.bits}: keep "
                    f"compressed-tensors, or quantise with other widths"
                )
            if N % MULTIPLE or K % MULTIPLE:
                raise UsageError(
                    f"GPTQ readers take multiples of {MULTIPLE} outputs and inputs, {name} is "
                    f"[{N}, {K}]: keep compressed-tensors, or leave that module unquantised"
                )
            if name != HEAD and not place_in_layers(name):
                raise UsageError(
                    f"GPTQ holds linears of numbered layers and {HEAD}, {name} is neither: keep "
                    f"compressed-tensors, or leave that module unquantised"
                )
        notes = gptq_notes(self.schemes, self.plain)
        self.differs: list[str] = []
        for name in sorted(self.tables):
            dtype = str(self._dtype(name)).removeprefix("torch.")
            notes.append(f"{name} is stored in {dtype}: GPTQ has no place for a packed embedding")
            self.differs.append(f"{name} was rounded to {dtype}")
        return notes

    def write(self, folder: Path, shard_bytes: int) -> dict[str, int]:
        """Weights, config.json and quantize_config.json; bytes as {"quantized", "other"}."""
        parts: list[Path] = []
        pending: dict[str, Tensor] = {}
        sizes = {"quantized": 0, "other": 0}

        def flush() -> None:
            parts.append(folder.parent / f"part-{len(parts):05d}.safetensors")
            save_tensors(parts[-1], pending)
            pending.clear()

        for name, tensors in self._modules():
            for key, tensor in tensors.items():
                pending[f"{name}.{key}"] = tensor
                packed = name in self.schemes and key != "bias"  # as `inspect` counts
                sizes["quantized" if packed else "other"] += tensor.nbytes
            if sum(tensor.nbytes for tensor in pending.values()) >= PART_BYTES:
                flush()
        if pending:
            flush()
        merge_shards(parts, folder, shard_bytes)
        weights = {name: N * K for name, (N, K) in self.source.shapes.items()}
        section = quantization_config(self.schemes, self.plain, weights)
        config = self.source.config | {"quantization_config": section}
        write_json(folder / "config.json", config)
        write_json(folder / "quantize_config.json", section)
        return sizes

    def _modules(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """The tensors of each module as they are written, by their names inside it."""
        source = self.source
        for module, names in groupby(source.reader.names, lambda name: name.rpartition(".")[0]):
            if module in source.twins:
                continue
            if module in self.tables:
                tensors = {"weight": dense(source.codes(module), self._dtype(module))}
                names = iter(())
            elif module in self.schemes:
                codes = with_fp16_scales(source.codes(module))
                tensors = self.format.write(codes, self.schemes[module])
                names = (name for name in names if name.endswith(".bias"))
            else:
                tensors = {}
            yield module, tensors | {n.rpartition(".")[2]: source.reader.tensor(n) for n in names}

    def _dtype(self, name: str) -> torch.dtype:
        """Of a table that becomes dense: that of its scales."""
        return self.source.reader.dtype(f"{name}.weight_scale")
