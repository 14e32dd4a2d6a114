"""What a model folder stores, told from its files and headers before a weight is read.

A folder to start from holds a whole model in 16 bits or more. One that is packed or stored in fewer
bits usually says so in `quantization_config`; other writers say it in a file of their own, or by
their tensors alone. Read as numbers, those would make a wrong model, so all of it is refused in one
line: what it is, and where that stands. So is an adapter, which is no model.

Of a plain folder's tensors, the model takes those that it has a parameter for. Buffers that
transformers computes by itself, as files of old still have them, are left out; what neither the
model nor transformers knows is listed.

    refuse_adapter(folder); refuse_packed(folder)
    names = names_of(model, spec.module_name)
    left = left_over(CheckpointReader(folder, names), model)      # or UsageError
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from torch import nn

from compress.errors import UsageError
from compress.storage.companions import MARKERS
from compress.storage.files import read_json
from compress.storage.safetensors import CheckpointReader

START_AGAIN = "start from the 16-bit model"
PLAIN = ("F64", "F32", "F16", "BF16")  # dtypes, as safetensors spells them

ADAPTER_FILE = "adapter_config.json"
ADAPTER_TENSOR = re.compile(r"\.lora_|\.base_layer\.|\.modules_to_save\.|^base_model\.model\.")

# Keys of config.json that only packed checkpoints have: transformers', compressed-tensors' of old,
# and MLX's.
MARKING_KEYS = ("quantization_config", "compression_config", "quantization")
# Last parts of names of what is packed, or lies beside it. None is a parameter of a family here.
MARKING_TENSOR = re.compile(
    r"scales?(_|$)|zeros?(_|$)|zero_point|qweight|q_weight|weight_packed|packed|q_perm|g_idx|"
    r"absmax|quant_|_quant|SCB$|weight_format|codebook|^codes$|W_q$|^meta$|^biases$|_amax$|trellis|^(su|sv|suh|svh)$"
)

# Buffers that transformers computes from the config, where older versions wrote them.
BUFFERS = re.compile(
    r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$|"
    r"(^|\.)(position_ids|attention\.bias|attention\.masked_bias|attn\.bias|attn\.masked_bias)$"
)


def refuse_adapter(folder: Path) -> None:
    """UsageError for a folder that holds an adapter: weights to be added to another model."""
    if not (folder / ADAPTER_FILE).is_file():
        return
    settings = read_json(folder / ADAPTER_FILE) or {}
    base = settings.get("base_model_name_or_path")
    of = f" of {base!r}" if isinstance(base, str) and base else ""
    kind = settings.get("peft_type")
    name = f" ({kind})" if isinstance(kind, str) else ""
    raise UsageError(
        f"{folder} is an adapter{of}{name}, says {ADAPTER_FILE}: merge it into that model first "
        f"(merge_and_unload of peft), and save the result without {ADAPTER_FILE}"
    )


def refuse_packed(folder: Path, read: str | None = None) -> None:
    """UsageError for a folder whose JSON files say that its weights are packed.

    `read`: the method of `quantization_config` that is read all the same.
    """
    if said := said_packed(folder, read):
        raise UsageError(f"{folder} is {said}: {START_AGAIN}")


def said_packed(folder: Path, read: str | None = None) -> str | None:
    """Where a folder's JSON files say that its weights are packed, and how; None: they do not.

    `read`: as above.
    """
    config = read_json(folder / "config.json") or {}
    section = config.get("quantization_config")
    if read is not None and isinstance(section, dict) and section.get("quant_method") == read:
        del config["quantization_config"]
    parts = {"": config} | {
        f"{key}.": part for key, part in config.items() if isinstance(part, dict)
    }
    for place, part in parts.items():
        for key in MARKING_KEYS:
            if part.get(key):
                return f"quantised already{_what(part[key])}, says {place}{key} in config.json"
    for file in MARKERS:
        if (folder / file).is_file():
            what = _what(read_json(folder / file) or {})
            return f"quantised already{what}, says {file}"
    return None


def _what(section: Any) -> str:
    """The method that a section names, wherever it does."""
    if not isinstance(section, dict):
        return ""
    inner = section.get("quantization")
    for part in (section, inner if isinstance(inner, dict) else {}):
        for key in ("quant_method", "quant_algo", "format", "bits", "w_bit"):
            if isinstance(part.get(key), str | int) and not isinstance(part[key], bool):
                found = f"{part[key]} bits" if key in ("bits", "w_bit") else part[key]
                return f" ({found})"
    return ""


def names_of(
    model: nn.Module, prefix: str, module_name: Callable[[str], str]
) -> Callable[[str], str]:
    """What turns a file's names into those of the model's modules.

    A base model is saved without the `prefix` that it has inside one with a head ("model."); as in
    transformers it is put in front, or taken away, where only that makes a name of the model's.
    """
    known = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    known |= {name for name, _ in model.named_parameters(remove_duplicate=False)}

    def rename(tensor: str) -> str:
        name = module_name(tensor)
        if name in known:
            return name
        other = name.removeprefix(prefix) if name.startswith(prefix) else prefix + name
        return other if other in known else name

    return rename


@dataclass(frozen=True)
class LeftOver:
    """The tensors of a file that the model does not take.

    Attributes:
        buffers: transformers computes them itself.
        unknown: nobody knows them.
        unread: transformers knows that files of the family have them, and does not read them.
    """

    buffers: list[str]
    unknown: list[str]
    unread: list[str] = field(default_factory=list)


def left_over(reader: CheckpointReader, model: nn.Module) -> LeftOver:
    """Sorts what the model has no parameter for.

    Raises UsageError, naming a tensor and its file, for weights that are packed or no
    floating-point numbers, and for those of an adapter.
    """
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    own = {name for name, _ in model.named_buffers()}
    left = [name for name in reader.names if name not in parameters]
    buffers = [name for name in left if name in own or BUFFERS.search(name)]
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    rules = [re.compile(rule) for rule in cast(Iterable[str], ignored)]
    unread = [n for n in left if n not in buffers and any(rule.search(n) for rule in rules)]
    unknown = [name for name in left if name not in {*buffers, *unread}]
    for name in unknown:
        file, last = reader.entry(name).file, name.rpartition(".")[2]
        if ADAPTER_TENSOR.search(name):
            raise UsageError(
                f"{reader.folder} holds an adapter: {reader.written_name(name)!r} in {file.name}: "
                f"merge it first (merge_and_unload of peft)"
            )
        if MARKING_TENSOR.search(last) or ".weight." in name:
            raise UsageError(
                f"{reader.folder} is quantised already, though config.json does not say so: "
                f"{file.name} holds {reader.written_name(name)!r}: {START_AGAIN}"
            )
    for name in sorted(parameters & {*reader.names}):
        entry = reader.entry(name)
        if entry.dtype not in PLAIN:
            raise UsageError(
                f"{reader.folder}: {reader.written_name(name)!r} in {entry.file.name} has dtype "
                f"{entry.dtype}, expected {', '.join(PLAIN)}: packed weights, or fewer than 16 "
                f"bits: {START_AGAIN}"
            )
    return LeftOver(buffers, unknown, unread)
