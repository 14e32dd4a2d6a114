"""Packed experts of types that transformers reads as one tensor of all: put together when loaded.

Their files have a place for each packed expert, as engines look for it, and transformers has none.
All that is packed is made dense here, and the whole model handed to transformers.

    if has_parted_experts(config, folder):
        model, report = read_whole(folder, config, torch.bfloat16, output_loading_info=True)
"""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from compress.checkpoint.packed import PackedLinears
from compress.errors import CheckpointError
from compress.kernels.reference import dense
from compress.models.families import MULTIMODAL, experts_of
from compress.models.fused import Whole, joined, wholes_of
from compress.models.skeleton import ASSUMED_DTYPE, declared_dtype, empty_model
from compress.storage.safetensors import CheckpointReader

PACKED = (".weight_packed", ".qweight")
EXPERTS = ".experts."


def has_parted_experts(config: PretrainedConfig, folder: Path) -> bool:
    """Whether a folder holds packed experts that transformers has no place for."""
    experts = experts_of(config.model_type)
    if experts is None or experts.files is None:
        return False
    names = CheckpointReader(folder).names
    return any(EXPERTS in name and name.endswith(PACKED) for name in names)


def read_whole(
    folder: Path, config: PretrainedConfig, dtype: torch.dtype | None, **options: Any
) -> object:
    """What `from_pretrained` gives for a folder with parted experts, all of it dense.

    Raises UnpackableError for what is packed in another way than we read, and CheckpointError for
    experts of which some are missing.
    """
    linears, dtype = PackedLinears(folder), dtype or declared_dtype(config) or ASSUMED_DTYPE
    packed = {f"{name}.{key}" for name, f in linears.formats.items() for key in f.suffixes}
    tensors = {n: linears.reader.tensor(n) for n in linears.reader.names if n not in packed}
    for name in linears.schemes:
        if name not in linears.twins:  # which transformers ties
            tensors[f"{name}.weight"] = dense(linears.codes(name), dtype)
    config = without_section(config)
    model = empty_model(config, config.model_type in MULTIMODAL)
    if wholes := wholes_of(model):  # of other types transformers merges them
        _put_together(tensors, wholes, folder)
    options |= {"config": config, "dtype": dtype, "state_dict": tensors}
    options.pop("trust_remote_code", None)
    return type(model).from_pretrained(None, **options, trust_remote_code=False)


def _put_together(tensors: dict[str, Tensor], wholes: list[Whole], folder: Path) -> None:
    """Makes wholes of all experts' tensors, in place."""
    parted = {name for name in tensors if EXPERTS in name}
    for name, whole in joined(parted, wholes).items():
        parts = {part: tensors.pop(part) for names in whole.parts for part in names}
        parted -= {*parts}
        if odd := [part for part, tensor in parts.items() if tensor.shape != whole.shape]:
            raise CheckpointError(
                f"{folder}: {odd[0]} has shape {list(parts[odd[0]].shape)}, expected "
                f"{list(whole.shape)} from config.json"
            )
        tensors[name] = whole.join(parts)
    if parted:
        raise CheckpointError(
            f"{folder} has {min(parted)}, and lacks others of its layer's experts"
        )


def without_section(config: PretrainedConfig) -> PretrainedConfig:
    """The config of a model whose quantisation is given to transformers apart from it."""
    config = copy.deepcopy(config)
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return config
