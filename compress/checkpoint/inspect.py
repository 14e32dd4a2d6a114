"""What a checkpoint holds, from its headers and JSON files alone.

Ours or anybody's: compressed-tensors, GPTQ, GGUF, or 16 bits.

    inspect("out")["modules"][0]      # {"name", "shape", "bits", "group_size", "symmetric"}
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from compress.checkpoint.compressed_tensors import module_schemes
from compress.checkpoint.engines import HEAD
from compress.checkpoint.gguf.inspect import inspect_gguf
from compress.checkpoint.packed import EMBEDDING
from compress.checkpoint.quantization_config import checked_section, gptq_scheme, read_config
from compress.errors import CheckpointError, UsageError
from compress.models.config_values import check_config
from compress.models.families import ARCHITECTURES, MULTIMODAL
from compress.recipe.source import parse_yaml
from compress.scheme import Scheme
from compress.storage.files import read_json
from compress.storage.safetensors import CheckpointReader

# Fields of a scheme that are listed where they say something.
RARE_FIELDS = ("per_tensor", "act_order", "activation_bits")


def inspect(path: str | Path) -> dict[str, Any]:
    """What a checkpoint folder holds, from its headers and JSON files alone.

    Returns {"format", "average_bits", "modules": [{"name", "shape", "bits", "group_size",
    "symmetric"}], "bytes": {"quantized", "other", "total"}, "recipe", "provenance"}. Every matrix
    is a module; one that is not quantised has the bits of its dtype and None for group_size and
    symmetric. group_size None on a quantised module is one scale per output channel, or one in all;
    `per_tensor`, `act_order` and `activation_bits` are there where they say something, `format`
    where codes are in int8, `codes_of` for a head that is the embedding. A GGUF file, or a folder
    without others, has llama.cpp's names. Raises UsageError if there is no such folder,
    CheckpointError if it is damaged.
    """
    folder = Path(path)
    files = [folder] if folder.suffix == ".gguf" else sorted(folder.glob("*.gguf"))
    if files and files[0].is_file() and not any(folder.glob("*.safetensors")):
        beside = {
            "recipe": _read_recipe(files[0].parent),
            "provenance": read_json(files[0].parent / "modelpress.json"),
        }
        found = inspect_gguf(files) | beside
        found["modules"].sort(key=lambda module: _natural(module["name"]))
        return found | {"average_bits": average_bits(found["modules"])}
    if not folder.is_dir():
        raise UsageError(f"no such model folder: {path} (download a hub model first: hf download)")
    config, file = read_config(folder), folder / "config.json"
    if config.get("model_type") in (*ARCHITECTURES, *MULTIMODAL):  # others mean else by these keys
        check_config(config, file)
    section = checked_section(config, file)
    reader = CheckpointReader(folder)
    quantised = _quantised_modules(reader, section)
    modules = quantised | {
        name.removesuffix(".weight"): _plain_module(reader, name)
        for name in reader.names
        if name.endswith(".weight")
        and len(reader.shape(name)) == 2
        and name.removesuffix(".weight") not in quantised
    }
    quantised_bytes = sum(
        reader.nbytes(name)
        for name in reader.names
        if name.rpartition(".")[0] in quantised and not name.endswith(".bias")  # as in the plan
    )
    listed = [{"name": name, **modules[name]} for name in sorted(modules, key=_natural)]
    return {
        "format": section.get("quant_method", "unquantised"),
        "average_bits": average_bits(listed),
        "modules": listed,
        "bytes": {
            "quantized": quantised_bytes,
            "other": reader.nbytes() - quantised_bytes,
            "total": reader.nbytes(),
        },
        "recipe": _read_recipe(folder),
        "provenance": read_json(folder / "modelpress.json"),
    }


def average_bits(modules: Iterable[Mapping[str, Any]]) -> float | None:
    """Bits a weight of `inspect`'s modules that are quantised, scales not counted; None: of none.

    A head that is the embedding counts once, as in the plan.
    """
    counted = [
        (math.prod(module["shape"]), module["bits"])
        for module in modules
        if module.get("symmetric") is not None and "codes_of" not in module
    ]
    weights = sum(count for count, _ in counted)
    return sum(count * bits for count, bits in counted) / weights if weights else None


def _quantised_modules(reader: CheckpointReader, section: dict[str, Any]) -> dict[str, Any]:
    names = sorted({name.rpartition(".")[0] for name in reader.names})
    if section.get("quant_method") == "gptq":
        return {n: _gptq_module(reader, n, section) for n in names if f"{n}.qweight" in reader}
    scaled = [name for name in names if f"{name}.weight_scale" in reader]
    return {
        name: {
            "shape": _shape(reader, name, scheme.bits),
            "bits": scheme.bits,
            "group_size": scheme.group_size,
            "symmetric": scheme.symmetric,
            **{key: value for key in RARE_FIELDS if (value := getattr(scheme, key))},
            **_int8(reader, name),
        }
        for name, scheme in module_schemes(section, scaled).items()
    }


def _int8(reader: CheckpointReader, name: str) -> dict[str, str]:
    """The format of a module whose codes are in int8: its own, or those of the embedding."""
    weight = f"{name}.weight"
    if weight in reader and reader.dtype(weight) == torch.int8:
        return {"format": "int-quantized"}
    if weight not in reader and (table := _table(reader, name)):
        return {"format": "int-quantized", "codes_of": table}
    return {}


def _table(reader: CheckpointReader, name: str) -> str | None:
    """The embedding in int8 whose codes a tied head of scales alone multiplies by."""
    packed = f"{name}.weight_packed" in reader or name.rpartition(".")[2] != HEAD
    ends = (n for n in reader.names if n.endswith(f"{EMBEDDING}.weight"))
    found = next((n for n in ends if reader.dtype(n) == torch.int8), None)
    return None if packed or found is None else found.removesuffix(".weight")


def _shape(reader: CheckpointReader, name: str, bits: int) -> list[int]:
    if f"{name}.weight_shape" in reader:  # two integers; the packed width alone is ambiguous
        _sizes(reader, f"{name}.weight_shape", 1)
        return reader.tensor(f"{name}.weight_shape").tolist()
    if f"{name}.weight_packed" in reader:  # of small floats, which fill their bytes
        N, columns = _sizes(reader, f"{name}.weight_packed", 2)
        return [N, columns * 8 * reader.dtype(f"{name}.weight_packed").itemsize // bits]
    weight = f"{name}.weight"
    if weight not in reader and (table := _table(reader, name)):
        weight = f"{table}.weight"
    return list(reader.shape(weight))


def _sizes(reader: CheckpointReader, name: str, axes: int) -> tuple[int, ...]:
    """The shape of a tensor that has so many axes, none of them empty; CheckpointError if not."""
    shape = reader.shape(name)
    if len(shape) != axes or 0 in shape:
        raise CheckpointError(
            f"{reader.folder}: {name} has shape {list(shape)}, expected {axes} sizes above 0"
        )
    return shape


def _gptq_module(reader: CheckpointReader, name: str, section: dict[str, Any]) -> dict[str, Any]:
    """Width and groups as the shapes have them, where they say it; all else by the section."""
    scheme = gptq_scheme(section, name) or Scheme(section["bits"], None)
    words, N = _sizes(reader, f"{name}.qweight", 2)
    groups, _ = _sizes(reader, f"{name}.scales", 2)
    known = f"{name}.g_idx" in reader
    K = _sizes(reader, f"{name}.g_idx", 1)[0] if known else words * 32 // scheme.bits
    return {
        "shape": [N, K],
        "bits": words * 32 // K,
        "group_size": -(-K // groups) if groups > 1 else scheme.group_size,
        "symmetric": scheme.symmetric,
        **({"act_order": True} if scheme.act_order else {}),
    }


def _plain_module(reader: CheckpointReader, name: str) -> dict[str, Any]:
    bits = 8 * reader.dtype(name).itemsize
    shape = list(reader.shape(name))
    return {"shape": shape, "bits": bits, "group_size": None, "symmetric": None}


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key under which layer 2 comes before layer 10."""
    parts = name.split(".")
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts]


def _read_recipe(folder: Path) -> Any:
    file = folder / "recipe.yaml"
    try:
        recipe = parse_yaml(file.read_text(encoding="utf-8"))[1]
    except FileNotFoundError:
        return None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{file} is not valid YAML: {reason}") from None
    if not isinstance(recipe, dict):
        raise CheckpointError(f"{file} is not a recipe: expected sections such as `model:`")
    return recipe
