"""Opening a checkpoint as a model that runs.

`load` is transformers, with three differences. Linears that are packed stay packed, on a GPU and on
a CPU (transformers makes them dense at the first forward). What it only warns about (a tensor that
is missing, a quantisation method it does not know) would leave randomly initialised weights in the
model, so here it is an error; and every error is one line. Code from a checkpoint is never run, and
pickles are never read. A multimodal model comes with its processor, and prunes visual tokens if a
strategy was saved with it.

    model, tokenizer = load("out")
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from compress.checkpoint.packed import PackedLinears, check_scale
from compress.checkpoint.quantization_config import (
    INTEGERS,
    checked_section,
    format_of,
    groups_of,
    is_packed,
    needs_own_reader,
    read_config,
)
from compress.errors import CheckpointError, UsageError
from compress.kernels.cpu import native
from compress.loading.parted_experts import has_parted_experts, read_whole, without_section
from compress.loading.processor import check_cpu_level
from compress.loading.transformers_plugin import ModelpressConfig
from compress.memory import chosen_device, multiplies_16_bits
from compress.models.config_values import (
    check_config,
    check_extent,
    check_generation,
    check_tokenizer,
)
from compress.models.families import MULTIMODAL, experts_of, refuse_partly_seen
from compress.models.pretrained import TOKENIZER_FILES, guarded, local_folder, processor_reader
from compress.pruning.saved import apply_strategy, saved_strategy
from compress.storage.indexed import indexed
from compress.storage.safetensors import CheckpointReader


def load(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | Literal["auto"] | None = None,
    *,
    prune: bool = True,
    packed: bool | None = None,
    fuse: bool = False,
    activation_bits: int | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | ProcessorMixin]:
    """A model in evaluation mode on `device`, and its tokenizer, if it is multimodal its processor.

    path: a folder, or a model id on the hub. device: `auto` is a GPU where there is one. dtype:
    `auto` keeps the checkpoint's; None does so too, but for one of 16 bits on a CPU whose products
    in bf16 are slow, which runs (and would be saved) in fp32. prune: whether a strategy saved with
    the checkpoint is applied; `model.visual_token_pruning` is then its context.
    packed: whether quantised linears stay packed (QuantLinear); False makes all of them dense; None
    keeps compressed-tensors `pack-quantized`, or of integers with integer activations, and GPTQ
    packed, and leaves other formats (AWQ, FP8) to transformers; models with experts too, which are
    dense there.
    fuse: whether packed linears that read the same input run in one launch.
    activation_bits: packed linears round what they read to so many bits (2 to 8), token by token,
    and multiply integers: faster with several tokens, less exact.

    Raises UsageError if there is no such folder and no such id can be reached, or if it is of a
    multimodal family that is not supported, and CheckpointError
    if what is there is not a whole model that can be loaded so; it names the module.
    """
    check_cpu_level()
    if packed is False and activation_bits is not None:
        raise UsageError(
            "activation_bits is for packed linears: leave it out, or packed=False (--dense)"
        )
    given, path = path, _checked_folder(path)
    device = chosen_device(device) if isinstance(device, str) else device
    config = guarded(path, AutoConfig.from_pretrained)
    refuse_partly_seen(config)
    strategy = saved_strategy(config, path) if prune else None
    multimodal = config.model_type in MULTIMODAL
    kind = AutoModelForImageTextToText if multimodal else AutoModelForCausalLM
    if dtype is None and _is_slow(config, device):
        dtype = torch.float32
    options: dict[str, Any] = {"dtype": dtype or "auto", "use_safetensors": True}
    section = checked_section(config.to_dict(), path / "config.json")
    if packed is None:
        packed = is_packed(section) and experts_of(config.model_type) is None
    if section and (packed or needs_own_reader(section)):
        options["quantization_config"] = ModelpressConfig(packed, fuse, activation_bits)
        options["config"] = without_section(config)
    elif fuse:
        raise UsageError(f"{path} has no packed linears to fuse: leave out fuse=True")
    elif activation_bits is not None:
        raise UsageError(f"{path} has no packed linears: leave out activation_bits")
    elif section.get("quant_method") == "compressed-tensors":
        _check_status(path, section)
    if torch.device(device).type != "cpu":
        options["device_map"] = {"": device}  # or all of it would lie in the host's memory first
    with indexed(path) as place:
        opens: Callable[..., Any] = kind.from_pretrained
        parted = has_parted_experts(config, path) or (
            experts_of(config.model_type) is not None and needs_own_reader(section)
        )
        if section and not packed and parted:
            opens = partial(read_whole, config=config)
            options = {"dtype": None if dtype == "auto" else dtype} | {
                k: v for k, v in options.items() if k == "device_map"
            }
        loaded: Any = guarded(place, opens, output_loading_info=True, **options)
    model, report = loaded
    missing = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if missing:
        raise CheckpointError(
            f"{path} lacks {len(missing)} tensors that the model needs, or has them in a format "
            f"that transformers does not know; the first is {missing[0]}"
        )
    read = partial(_read_processor, config=config) if multimodal else AutoTokenizer.from_pretrained
    processor = guarded(path, read)
    model = model.eval().to(device)
    model.name_or_path = str(given)
    if strategy is not None:
        apply_strategy(model, strategy, processor)
    return model, processor


def _read_processor(
    path: str | Path, config: PretrainedConfig, trust_remote_code: bool
) -> ProcessorMixin:
    """Asks for the class only here: one whose packages are missing is refused as other faults."""
    return processor_reader(config)(path, trust_remote_code=trust_remote_code)


def fastest_packing(
    path: str | Path, device: str | torch.device = "cpu", activation_bits: int | None = None
) -> bool | None:
    """What `packed` of `load` takes least time here; None if the checkpoint has nothing packed.

    Where linears round what they read, packed: dense ones would not. Dense where kernels do not run
    the groups of a linear, and where a model has experts. Raises as `load` does.
    """
    path = _checked_folder(path)
    config = guarded(path, AutoConfig.from_pretrained)
    section = checked_section(config.to_dict(), path / "config.json")
    if not is_packed(section):
        return None
    rounds = activation_bits is not None or any(
        group.get("input_activations") for group in groups_of(section)
    )
    if rounds:
        return True
    if experts_of(config.model_type) is not None:  # one dense tensor in transformers
        return False
    return native.packed_is_faster(device) and PackedLinears(path).runs


def _is_slow(config: PretrainedConfig, device: str | torch.device) -> bool:
    """Whether products in the checkpoint's own dtype take much longer here than in fp32."""
    own = {part.dtype for part in (config, config.get_text_config())}
    return bool(own & {torch.bfloat16, torch.float16}) and not multiplies_16_bits(str(device))


def _checked_folder(path: str | Path) -> Path:
    """The folder, that of a hub id fetched before, once plain is what transformers says late."""
    folder = local_folder(path)
    config, file = read_config(folder), folder / "config.json"
    check_config(config, file)  # before transformers reads it
    check_generation(folder)
    checked_section(config, file)
    reader = CheckpointReader(folder)
    check_extent(config, reader, file)
    for name in reader.names:
        if name.endswith(".bias") and not reader.dtype(name).is_floating_point:
            found = str(reader.dtype(name)).removeprefix("torch.")
            raise CheckpointError(
                f"{folder}: {name} has dtype {found}, expected floating-point numbers: the "
                f"checkpoint is damaged, or of another format"
            )
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise CheckpointError(
            f"{folder} has no tokenizer ({', '.join(TOKENIZER_FILES)}): copy the files of the "
            f"model it was made from"
        )
    check_tokenizer(folder)
    return folder


def _check_status(folder: Path, section: dict[str, Any]) -> None:
    """CheckpointError where transformers would take codes for weights, or weights for codes, or
    would take for scales what are none.

    It goes by quantization_status alone: `compressed` is codes, all else is weights.
    """
    status = section.get("quantization_status")
    reader = CheckpointReader(folder)
    if {format_of(section, group) for group in groups_of(section)} <= {*INTEGERS}:
        for scale in (name for name in reader.names if name.endswith(".weight_scale")):
            check_scale(reader, scale)
    for scale in (name for name in reader.names if name.endswith(".weight_scale")):
        weight = scale.removesuffix("_scale")
        if weight not in reader:
            continue
        dtype = reader.dtype(weight)
        has_codes = not dtype.is_floating_point or dtype.itemsize == 1  # fp8
        if has_codes != (status == "compressed"):
            found, taken = ("codes", "weights") if has_codes else ("weights", "codes")
            right = "compressed" if has_codes else "decompressed"
            raise CheckpointError(
                f"{folder}: {weight} holds {found}, which transformers would take for {taken}: its "
                f"quantization_status is {status!r}, set it to {right!r}"
            )
