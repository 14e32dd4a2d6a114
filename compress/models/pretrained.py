"""A multimodal checkpoint's processor: text and images in, a model's inputs out.

Some processors come with one for videos that only torchvision can run. Where torchvision is not
installed they are read without it, by a class of their own that has the same name; images are then
prepared by pillow, as transformers does it without torchvision.

    processor = guarded(path, processor_reader(config))
"""

from collections.abc import Callable
from typing import Any


def processor_reader(config: Any) -> Callable[..., Any]:
    """The `from_pretrained` that reads the processor of a model with this config."""
    import transformers
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
    from transformers.utils import is_torchvision_available

    kind = getattr(transformers, PROCESSOR_MAPPING_NAMES[config.model_type])
    if is_torchvision_available() or "video_processor" not in kind.get_attributes():
        return transformers.AutoProcessor.from_pretrained
    return _without_videos(kind).from_pretrained


def _without_videos(kind: Any) -> Any:
    """A subclass that neither reads nor needs a video processor."""

    def get_attributes(cls: Any) -> list[str]:
        return [name for name in kind.get_attributes() if name != "video_processor"]

    body = {
        "__doc__": kind.__doc__,
        "get_attributes": classmethod(get_attributes),
        "video_processor": None,
    }
    return type(kind.__name__, (kind,), body)
