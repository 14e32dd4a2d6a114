"""Exporting a finished checkpoint to another format: the same codes and scales, packed otherwise.

Nothing is quantised again unless a person asks for it (`requantise`), so what was measured stays
true. A format that cannot hold a checkpoint as it is refuses it in one line, before anything is
written. Another thing is lost only where a person asks for it: other formats store scales in fp16,
and those of a bf16 or fp32 checkpoint may not be fp16 numbers. `round_scales` rounds them, and how
far is said in the result and in modelpress.json.

Weights are read and written one module at a time. As in a run, everything is put together in
OUT/.modelpress and moved at the end, so that OUT holds a whole checkpoint or none.

    result = export("out", "gptq", "out-gptq")
    result.notes                                   # e.g. which engines will not load it
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from compress.checkpoint.compressed_tensors import PACKED_SUFFIXES, module_schemes
from compress.checkpoint.gguf.format import GgufFormat
from compress.checkpoint.gptq import GptqFormat
from compress.checkpoint.quantization_config import (
    checked_section,
    extras,
    groups_of,
    has_act_order,
    read_config,
    strategy_of,
)
from compress.errors import CheckpointError, CompressError, UsageError
from compress.kernels.packing import packed_columns, unpack_rows
from compress.registry import Registry
from compress.storage.files import atomic_write, read_json
from compress.storage.output_folder import COMPANIONS, WORK_FOLDER, check_output, publish
from compress.storage.safetensors import CheckpointReader, parse_size

PROVENANCE = "modelpress.json"


class CheckpointFormat(Protocol):
    """How a packed checkpoint is written in one format.

    `companions`: with the tokenizer files. `can_requantise`: it is constructed with a second
    argument, whether what it cannot hold as it is may be stored otherwise.
    """

    name: str
    companions: bool
    can_requantise: bool

    def __init__(self, source: "PackedCheckpoint"): ...

    def check(self) -> list[str]:
        """What a person should know first, a line each; UsageError if the format cannot hold it."""

    def write(self, folder: Path, shard_bytes: int) -> dict[str, int]:
        """Writes the weights and what describes them; bytes as {"quantized", "other"}."""


CHECKPOINT_FORMATS: Registry[Any] = Registry("export format")
CHECKPOINT_FORMATS["gptq"] = GptqFormat
CHECKPOINT_FORMATS["gguf"] = GgufFormat


@dataclass(frozen=True)
class ScaleRounding:
    """What rounding to fp16 changed: `changed` of `scales`, each by at most `largest` of itself."""

    scales: int
    changed: int
    largest: float


@dataclass(frozen=True)
class ExportResult:
    """What an export has made. `bytes` are those of the tensors: quantized, other, total."""

    path: Path
    format: str
    bytes: dict[str, int]
    rounding: ScaleRounding
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self) | {"path": str(self.path)}


def export(
    folder: str | Path,
    format: str,
    output: str | Path,
    *,
    overwrite: bool = False,
    round_scales: bool = False,
    requantise: bool = False,
    shard_size: str = "5GB",
) -> ExportResult:
    """Writes the compressed-tensors checkpoint in `folder` to `output` in another format.

    Args:
        format: a name of CHECKPOINT_FORMATS.
        overwrite: replace a checkpoint in `output`; it stays whole until the new one is.
        round_scales: round scales that are not fp16 numbers, instead of refusing them.
        requantise: store modules that the format has no place for in the nearest one it has; the
            notes of the result say which, and how far their weights moved.
        shard_size: the most that one file of weights holds, where the format has shards.

    Raises:
        UsageError: there is no such format, it cannot hold this checkpoint, or `output` is taken.
        CheckpointError: the checkpoint is damaged.
    """
    folder, output = Path(folder), Path(output)
    kind = CHECKPOINT_FORMATS[format]
    if folder.resolve() == output.resolve():
        raise UsageError(f"output {output} is the checkpoint itself: choose another --output")
    check_output(output, overwrite)
    if (output / WORK_FOLDER / "journal.jsonl").exists():
        raise UsageError(f"output {output} holds an unfinished run: choose another --output")
    shard_bytes = parse_size(shard_size)
    source = PackedCheckpoint(folder)
    if requantise and not kind.can_requantise:
        raise UsageError(f"{kind.name} holds every module as it is, or not: leave out --requantise")
    exporter: CheckpointFormat = kind(source, True) if requantise else kind(source)
    notes = exporter.check()
    rounding = _check_scales(source, round_scales)
    if rounding.changed:
        notes.append(
            f"{rounding.changed:,} of {rounding.scales:,} scales were rounded to fp16, by at most "
            f"{rounding.largest:.1e} of themselves"
        )
    with _work_folder(output) as final:
        sizes = exporter.write(final, shard_bytes)
        _copy_companions(folder, final, COMPANIONS if exporter.companions else ())
        publish(final, output)
    sizes["total"] = sum(sizes.values())
    result = ExportResult(output, exporter.name, sizes, rounding, notes)
    with atomic_write(output / PROVENANCE) as file:
        file.write((json.dumps(_provenance(source, result), indent=2) + "\n").encode())
    return result


@contextmanager
def _work_folder(output: Path) -> Iterator[Path]:
    """OUT/.modelpress/final, empty; after an error nothing of it is left."""
    new = not output.exists()
    work = output / WORK_FOLDER
    try:
        shutil.rmtree(work, ignore_errors=True)
        (work / "final").mkdir(parents=True)
        yield work / "final"
    except BaseException as error:  # an interrupt as well
        shutil.rmtree(output if new else work, ignore_errors=True)
        if isinstance(error, OSError):
            where = error.filename or output
            raise CompressError(f"cannot write {where}: {error.strerror or error}") from error
        raise


def _copy_companions(folder: Path, final: Path, patterns: tuple[str, ...]) -> None:
    for pattern in (*patterns, "recipe.yaml"):
        for file in sorted(folder.glob(pattern)):
            if file.is_file():
                shutil.copyfile(file, final / file.name)


def _provenance(source: "PackedCheckpoint", result: ExportResult) -> dict[str, Any]:
    """The checkpoint's own history, and what it was exported from."""
    history = read_json(source.folder / PROVENANCE) or {}
    return history | {
        "bytes": history.get("bytes", {}) | result.bytes,
        "exported_from": {
            "path": str(source.folder),
            "format": "compressed-tensors",
            "fingerprint": source.reader.fingerprint(),
        },
        "export": {
            "format": result.format,
            "scales": asdict(result.rounding),
            "notes": result.notes,
        },
    }


# ---- what is exported ---------------------------------------------------------------------------


@dataclass(frozen=True)
class PackedModule:
    """One quantised linear: weight = (codes - zero point) * scale.

    codes [N, K] int16, scale [N, G] float, zero_point [N, G] int16 or None if symmetric; codes and
    zero points are signed.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None


class PackedCheckpoint:
    """A compressed-tensors folder, checked, whose modules are read as codes and scales.

    Attributes:
        folder, config, reader: where it is, its config.json, its tensors.
        schemes: width and group size of each quantised module, by full name.
        shapes: (N, K) of each.

    Raises UsageError for a folder that is not such a checkpoint, or that does more than weights in
    groups; CheckpointError if its tensors are not what its config.json says.
    """

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise UsageError(f"no such model folder: {folder}")
        self.folder = folder
        self.config = read_config(folder)
        section = checked_section(self.config, folder / "config.json")
        _check_section(folder, section)
        self.reader = CheckpointReader(folder)
        packed = [
            name.removesuffix(".weight_packed")
            for name in self.reader.names
            if name.endswith(".weight_packed")
        ]
        self.schemes = module_schemes(section, packed)
        unknown = [name for name in packed if name not in self.schemes]
        if unknown or not packed:
            raise CheckpointError(
                f"{folder}: {unknown[0]} is packed, but config.json does not say how"
                if unknown
                else f"{folder}: no module is packed as pack-quantized, which is what export reads"
            )
        self._check_names()
        self.shapes = {name: self._checked_shape(name) for name in packed}

    def _check_names(self) -> None:
        """A quantised module holds what its scheme needs, perhaps a bias, and nothing else."""
        for tensor in self.reader.names:
            module, _, key = tensor.rpartition(".")
            scheme = self.schemes.get(module)
            if scheme is None or key == "bias":
                continue
            if key not in PACKED_SUFFIXES or (key == "weight_zero_point" and scheme.symmetric):
                raise UsageError(
                    f"{tensor} is more than codes and scales, which no other format can hold"
                )

    def _checked_shape(self, name: str) -> tuple[int, int]:
        """N and K of a module whose tensors all have the shapes that its scheme asks for."""
        scheme, reader = self.schemes[name], self.reader
        N, K = reader.tensor(f"{name}.weight_shape").tolist()
        G = 1 if scheme.group_size is None else K // scheme.group_size
        expected = {
            "weight_packed": (N, packed_columns(K, scheme.bits)),
            "weight_scale": (N, G),
            "weight_shape": (2,),
        }
        if not scheme.symmetric:
            expected["weight_zero_point"] = (packed_columns(N, scheme.bits), G)
        for key, shape in expected.items():
            if reader.shape(f"{name}.{key}") != shape:
                raise CheckpointError(
                    f"{self.folder}: {name}.{key} has shape {reader.shape(f'{name}.{key}')}, but "
                    f"{scheme.bits} bits in groups of {scheme.group_size or K} take {shape}"
                )
        return N, K

    def module(self, name: str) -> PackedModule:
        """The codes, scales and zero points of one module."""
        bits, (N, K) = self.schemes[name].bits, self.shapes[name]
        middle = 2 ** (bits - 1)
        packed = self.reader.tensor(f"{name}.weight_packed")
        zero_point = None
        if f"{name}.weight_zero_point" in self.reader:
            words = self.reader.tensor(f"{name}.weight_zero_point")
            zero_point = unpack_rows(words.T, bits, N).T.to(torch.int16) - middle
        codes = unpack_rows(packed, bits, K).to(torch.int16) - middle
        return PackedModule(codes, self.reader.tensor(f"{name}.weight_scale"), zero_point)


def _check_section(folder: Path, section: dict[str, Any]) -> None:
    method = section.get("quant_method")
    if method != "compressed-tensors":
        found = f"is quantised with {method}" if method else "is not quantised"
        raise UsageError(
            f"{folder} {found}: export reads packed compressed-tensors, as `run` writes it"
        )
    groups = groups_of(section)
    weights = [group.get("weights") or {} for group in groups]
    more = extras(section) | {
        "online rotations": bool(section.get("transform_config")),
        "quantised activations": any(
            group.get("input_activations") or group.get("output_activations") for group in groups
        ),
        "one scale for a whole weight": any(strategy_of(w) == "tensor" for w in weights),
        "inputs permuted across groups (act-order)": any(map(has_act_order, weights)),
    }
    for what, found in more.items():
        if found:
            raise UsageError(f"{folder} has {what}, which other formats cannot hold")


# ---- scales -------------------------------------------------------------------------------------


def _check_scales(source: PackedCheckpoint, round_scales: bool) -> ScaleRounding:
    """What storing the scales in fp16 changes; UsageError if that is something and not wanted."""
    scales = changed = 0
    largest, first = 0.0, ""
    for name in source.schemes:
        scale = source.reader.tensor(f"{name}.weight_scale")
        scales += scale.numel()
        error = _rounding_error(source, name, scale)
        if error is None:
            continue
        if torch.isinf(error).any():
            raise UsageError(f"a scale of {name} is beyond fp16: keep compressed-tensors")
        first = first or name
        changed += int((error > 0).sum())
        largest = max(largest, float(error.max()))
    if changed and not round_scales:
        dtype = str(source.reader.dtype(f"{first}.weight_scale")).removeprefix("torch.")
        raise UsageError(
            f"{changed:,} of {scales:,} scales are no fp16 numbers, the first in {first} ({dtype}):"
            f" allow rounding them (--round-scales), by at most {largest:.1e} of themselves"
        )
    return ScaleRounding(scales, changed, largest)


def _rounding_error(source: PackedCheckpoint, name: str, scale: Tensor) -> Tensor | None:
    """|fp16(s) - s| / |s| of each scale [N, G] that multiplies something; None if all are 0."""
    exact = scale.double()
    error = ((exact.half().double() - exact) / exact).abs().nan_to_num(nan=0.0, posinf=torch.inf)
    if not error.any():
        return None
    # The scale of a group of zeros is arbitrary, and often too small for fp16.
    module = source.module(name)
    levels = module.codes.view(*scale.shape, -1)
    if module.zero_point is not None:
        levels = levels - module.zero_point.unsqueeze(-1)
    error *= levels.any(-1)
    return error.nan_to_num(nan=0.0, posinf=torch.inf) if error.any() else None
