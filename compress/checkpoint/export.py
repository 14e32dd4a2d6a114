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

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from compress.checkpoint.gguf.format import GgufFormat
from compress.checkpoint.gptq import GptqFormat
from compress.checkpoint.packed import PackedLinears, UnpackableError
from compress.checkpoint.quantization_config import (
    INTEGERS,
    checked_section,
    extras,
    format_of,
    groups_of,
    has_act_order,
    read_config,
    strategy_of,
)
from compress.errors import CheckpointError, UsageError
from compress.registry import Registry
from compress.storage.companions import copy_companions
from compress.storage.files import parse_size, read_json, write_json, writing
from compress.storage.lease import WORK_FOLDER, lease
from compress.storage.output_folder import (
    FINAL,
    PROVENANCE,
    check_output,
    files_below,
    publish,
    tidy,
    withdraw,
)

EXPORT = "export"  # in the place of a run's fingerprint


class CheckpointFormat(Protocol):
    """How a packed checkpoint is written in one format.

    `companions`: with the tokenizer files. `options`: what it takes beside the checkpoint, by name:
    `requantise`, whether what it cannot hold as it is may be stored otherwise; `keep_embeddings`,
    whether an embedding and a head in 16 bits stay so. `differs`, once checked: whose values are
    others than the checkpoint's, a clause each.
    """

    name: str
    companions: bool
    options: frozenset[str]
    differs: list[str]

    def __init__(self, source: PackedLinears): ...

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
    keep_embeddings: bool = False,
    shard_size: str = "5GB",
    document: Callable[[Path], None] | None = None,
) -> ExportResult:
    """Writes the compressed-tensors checkpoint in `folder` to `output` in another format.

    Args:
        format: a name of CHECKPOINT_FORMATS.
        overwrite: replace a checkpoint in `output`; it stays whole until the new one is.
        round_scales: round scales that are not fp16 numbers, instead of refusing them.
        requantise: store modules that the format has no place for in the nearest one it has; the
            notes of the result say which, and how far their weights moved.
        keep_embeddings: leave an embedding and a head that are not quantised as they are, where the
            format would round them to 8 bits.
        shard_size: the most that one file of weights holds, where the format has shards.
        document: called with the folder of the whole export, before that is moved to `output`.

    Raises:
        UsageError: there is no such format, it cannot hold this checkpoint, or `output` is taken or
            held by another process.
        CheckpointError: the checkpoint is damaged.
    """
    folder, output = Path(folder), Path(output)
    kind = CHECKPOINT_FORMATS[format]
    if folder.resolve() == output.resolve():
        raise UsageError(f"output {output} is the checkpoint itself: choose another --output")
    check_output(output, overwrite, unfinished=True)  # before anything is made there
    with lease(output) as held:
        if (output / WORK_FOLDER / "journal.jsonl").exists():
            raise UsageError(f"output {output} holds an unfinished run: choose another --output")
        shard_bytes = parse_size(shard_size)
        source = _opened(folder)
        check_output(output, overwrite, held.abandoned and _exported(output, kind.name, source))
        asked = {"requantise": requantise, "keep_embeddings": keep_embeddings}
        options = {option: True for option, value in asked.items() if value}
        if foreign := options.keys() - kind.options:
            option = min(foreign).replace("_", "-")
            raise UsageError(
                f"{kind.name} holds every module as it is, or not: leave out --{option}"
            )
        exporter: CheckpointFormat = kind(source, **options)
        notes = exporter.check()
        rounding = _check_scales(source, round_scales)
        if rounding.changed:
            notes.append(
                f"{rounding.changed:,} of {rounding.scales:,} scales were rounded to fp16, by at "
                f"most {rounding.largest:.1e} of themselves"
            )
        with _final_folder(output) as final:
            sizes = exporter.write(final, shard_bytes)
            sizes["total"] = sum(sizes.values())
            result = ExportResult(output, exporter.name, sizes, rounding, notes)
            if exporter.companions:
                copy_companions(folder, final)
            if (folder / "recipe.yaml").is_file():
                shutil.copyfile(folder / "recipe.yaml", final / "recipe.yaml")
            files = [*files_below(final), PROVENANCE]
            history = _provenance(source, result, exporter.differs)
            write_json(final / PROVENANCE, history | {"files": sorted(files)})
            if document is not None:
                document(final)
        with writing(output):
            publish(final, output, EXPORT)
            tidy(output)
    return result


@contextmanager
def _final_folder(output: Path) -> Iterator[Path]:
    """OUT/.modelpress/final, empty; after an error nothing of it is left."""
    final = output / WORK_FOLDER / FINAL
    with writing(output):
        withdraw(output)  # what a killed export had moved
        tidy(output)
        final.mkdir()
    try:
        with writing(output):
            yield final
    except BaseException:  # an interrupt as well
        tidy(output)
        raise


def _exported(output: Path, name: str, source: PackedLinears) -> bool:
    """Whether `output` holds an export of this checkpoint to this format, begun or done."""
    facts = read_json(output / PROVENANCE) or {}
    made, origin = _part(facts, "export"), _part(facts, "exported_from")
    same = origin.get("fingerprint") == source.reader.fingerprint()
    return made.get("format") == name and same


def _part(facts: dict[str, Any], name: str) -> dict[str, Any]:
    """A section of modelpress.json; empty where it is none, whoever wrote it."""
    found = facts.get(name)
    return found if isinstance(found, dict) else {}


def _provenance(source: PackedLinears, result: ExportResult, differs: list[str]) -> dict[str, Any]:
    """The checkpoint's own history, what it was exported from, and what is not as it was there."""
    history = read_json(source.folder / PROVENANCE) or {}
    history.pop("fingerprint", None)  # of the run, whose bytes these are not
    return history | {
        "bytes": _part(history, "bytes") | result.bytes,
        "exported_from": {
            "path": str(source.folder),
            "format": "compressed-tensors",
            "fingerprint": source.reader.fingerprint(),
        },
        "export": {
            "format": result.format,
            "scales": asdict(result.rounding),
            "notes": result.notes,
            "differs": differs,
        },
    }


# ---- what is exported ---------------------------------------------------------------------------


def _opened(folder: Path) -> PackedLinears:
    """The packed linears of a checkpoint, their shapes checked.

    Raises UsageError for a folder that is no such checkpoint, or that does more than weights in
    groups; CheckpointError if its tensors are not what its config.json says.
    """
    if not folder.is_dir():
        raise UsageError(f"no such model folder: {folder}")
    _refuse_section(folder, checked_section(read_config(folder), folder / "config.json"))
    try:
        source = PackedLinears(folder)
        shapes = source.shapes
    except UnpackableError as error:  # nobody asked to run it
        raise CheckpointError(str(error)) from error
    for name, (_, K) in shapes.items():
        size = source.schemes[name].group_size
        if size is not None and K % size:
            raise CheckpointError(f"{folder}: {name} has {K} inputs, no whole groups of {size}")
    _refuse_tensors(source)
    return source


def _refuse_section(folder: Path, section: dict[str, Any]) -> None:
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
    for what, present in more.items():
        if present:
            raise UsageError(f"{folder} has {what}, which other formats cannot hold")
    formats = {format_of(section, group) for group in groups}
    if "pack-quantized" not in formats or not formats <= {*INTEGERS}:
        raise CheckpointError(
            f"{folder}: no module is packed as pack-quantized, which is what export reads"
        )


def _refuse_tensors(source: PackedLinears) -> None:
    """A quantised module holds what its scheme needs, perhaps a bias, and nothing else."""
    for tensor in source.reader.names:
        module, _, key = tensor.rpartition(".")
        format = source.formats.get(module)
        if format and key not in {*format.suffixes, "bias"} - {format.g_idx}:
            raise UsageError(
                f"{tensor} is more than codes and scales, which no other format can hold"
            )


# ---- scales -------------------------------------------------------------------------------------


def _check_scales(source: PackedLinears, round_scales: bool) -> ScaleRounding:
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


def _rounding_error(source: PackedLinears, name: str, scale: Tensor) -> Tensor | None:
    """|fp16(s) - s| / |s| of each scale [N, G] that multiplies something; None if all are 0."""
    exact = scale.double()
    error = ((exact.half().double() - exact) / exact).abs().nan_to_num(nan=0.0, posinf=torch.inf)
    if not error.any():
        return None
    # The scale of a group of zeros is arbitrary, and often too small for fp16.
    weight = source.codes(name)
    groups = weight.codes.view(*scale.shape, -1)
    error *= (groups != weight.zero_points().unsqueeze(-1)).any(-1)
    return error.nan_to_num(nan=0.0, posinf=torch.inf) if error.any() else None
