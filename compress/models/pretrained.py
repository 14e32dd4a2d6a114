"""A model folder as transformers reads it: its place, its config, its processor, errors in a line.

Some processors come with one for videos that only torchvision can run. Where torchvision is not
installed they are read without it, by a class of their own that has the same name; images are then
prepared by pillow, as transformers does it without torchvision.

    folder = local_folder("path/or/hub-id"); config = load_config(folder)
    processor = guarded(folder, processor_reader(config))
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import huggingface_hub
from huggingface_hub.errors import HFValidationError

from compress.errors import CheckpointError, CompressError, UsageError
from compress.models.config_values import check_config, check_generation, reason_of
from compress.storage.companions import INDICES, WEIGHTS
from compress.storage.files import read_json

if TYPE_CHECKING:  # slow to import
    from transformers import PretrainedConfig, ProcessorMixin

Read = TypeVar("Read")

# Of a hub repository all comes here that goes along with a model, and weights as they are read.
LEFT_THERE = [pattern for pattern in WEIGHTS if pattern != "*.safetensors"]
LEFT_THERE += ["consolidated*.safetensors", "original/*"]
# For a plan, no weights at all.
LEFT_BY_PLANS = [*WEIGHTS, *INDICES, "original/*"]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


def local_folder(
    location: str | Path, revision: str | None = None, *, weights: bool = True
) -> Path:
    """The folder of a model: itself, or where a hub repository has been downloaded to.

    Without `weights` only what a hub repository holds beside them comes here. Raises UsageError if
    the hub has no such repository, or one whose config.json is wrong.
    """
    location = str(location)
    if Path(location).is_dir():
        return Path(location)
    if Path(location).exists():
        raise UsageError(f"model {location!r} is a file; expected a folder or a hub id")
    try:
        first = huggingface_hub.snapshot_download(
            location, revision=revision, allow_patterns=["config.json"]
        )
        # before the weights, which may take hours
        check_config(read_json(Path(first) / "config.json") or {}, f"{location}: config.json")
        left = LEFT_THERE if weights else LEFT_BY_PLANS
        folder = huggingface_hub.snapshot_download(
            location, revision=revision, ignore_patterns=left
        )
    except HFValidationError as error:
        raise UsageError(f"model {location!r} is neither a folder nor a valid hub id") from error
    except CompressError:
        raise
    except Exception as error:  # the hub client's errors share no base class
        raise UsageError(
            f"model {location!r} is not a folder here and could not be fetched from the hub "
            f"({reason_of(error)}): check the name and the network, or log in with `hf auth "
            f"login` if the model is gated"
        ) from error
    return Path(folder)


def load_config(folder: Path) -> "PretrainedConfig":
    """The transformers config of a folder; UsageError in one line if there is none to read."""
    from transformers import AutoConfig  # slow to import

    file = folder / "config.json"
    try:
        values = read_json(file)
    except CheckpointError as error:
        raise UsageError(str(error)) from error
    if values is None:
        raise UsageError(f"{folder} has no config.json: expected a transformers model folder")
    check_config(values, file)
    check_generation(folder)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # what a wrong value sets off is of any kind
        raise UsageError(f"{file} cannot be read: {reason_of(error)}") from error


def guarded(path: str | Path, from_pretrained: Callable[..., Read], **options: Any) -> Read:
    """Calls a `from_pretrained`, and turns what it raises into one line."""
    try:
        return from_pretrained(path, trust_remote_code=False, **options)
    except CompressError:
        raise
    except Exception as error:  # what a wrong value sets off is of any kind
        reason = reason_of(error)
        if isinstance(error, OSError) and not Path(path).is_dir():
            raise UsageError(
                f"{str(path)!r} is neither a folder here nor a model id that can be reached "
                f"({reason}): check the spelling and the network, or log in with `hf auth login` "
                f"if the model is gated"
            ) from error
        raise CheckpointError(f"{path} does not load in transformers: {reason}") from error


def processor_reader(config: "PretrainedConfig") -> "Callable[..., ProcessorMixin]":
    """The `from_pretrained` that reads the processor of a model with this config.

    It raises ValueError for one that does not know the image token of the model.
    """
    import transformers  # slow to import, as what follows
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES  # slow
    from transformers.utils import is_torchvision_available  # slow

    kind = getattr(transformers, PROCESSOR_MAPPING_NAMES[config.model_type])
    whole = is_torchvision_available() or "video_processor" not in kind.get_attributes()
    reads = transformers.AutoProcessor if whole else _without_videos(kind)

    def read(folder: str | Path, *, trust_remote_code: bool, **options: Any) -> "ProcessorMixin":
        processor = reads.from_pretrained(folder, trust_remote_code=False, **options)
        token, expected = getattr(processor, "image_token", None), config.image_token_id
        if token is None:
            raise ValueError("it knows no image token: processor_config.json is missing or wrong")
        found = processor.tokenizer.convert_tokens_to_ids(token)
        # Some are given one token an image, and put others in its place.
        if expected not in (found, *getattr(processor, "image_token_ids", ())):
            raise ValueError(
                f"its image token {token!r} has the number {found}, config.json says {expected}"
            )
        return processor

    return read


def _without_videos(kind: "type[ProcessorMixin]") -> "type[ProcessorMixin]":
    """A subclass that neither reads nor needs a video processor."""

    def get_attributes(cls: "type[ProcessorMixin]") -> list[str]:
        return [name for name in kind.get_attributes() if name != "video_processor"]

    body = {
        "__doc__": kind.__doc__,
        "get_attributes": classmethod(get_attributes),
        "video_processor": None,
    }
    return type(kind.__name__, (kind,), body)
