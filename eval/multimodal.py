"""A multimodal model that is already loaded, as the harness wants it.

The harness's own class reads the processor anew from the folder that the model came from. Here it
is handed over with the model: a checkpoint is read once, and one whose processor AutoProcessor
cannot read (a video processor without torchvision) works too. A model that prunes visual tokens
goes on doing so: it is generated from like any other.

    lm = multimodal_model(model, copy.deepcopy(processor), EvaluationSettings(batch_size=32))
"""

import functools
import gc
from typing import Any

from compress.errors import UsageError
from compress.eval.settings import EvaluationSettings


def is_multimodal(tokenizer: Any) -> bool:
    """Whether this is a processor that takes images, not a bare tokenizer."""
    return getattr(tokenizer, "image_processor", None) is not None


def multimodal_model(model: Any, processor: Any, settings: EvaluationSettings) -> Any:
    """The harness's `hf-multimodal` round a loaded model and its processor.

    Requests without images are answered by the language model alone, as for any text model.

    Raises:
        UsageError: a batch size that is no number, which `hf-multimodal` cannot work with.
    """
    if not isinstance(settings.batch_size, int):
        raise UsageError(
            f"batch_size: a multimodal model needs a number, found {settings.batch_size!r}"
        )
    return loaded_multimodal()(
        pretrained=model,
        tokenizer=processor,  # on which it sets padding
        batch_size=settings.batch_size,
        max_length=settings.max_length,
        add_bos_token=settings.add_bos_token,
        convert_img_format=True,
    )


@functools.cache
def loaded_multimodal() -> Any:
    """A class like the harness's `hf-multimodal`, made of a loaded model and its processor."""
    from lm_eval.models.hf_vlms import HFMultimodalLM  # slow to import

    class LoadedMultimodal(HFMultimodalLM):
        def _create_tokenizer(self, pretrained: Any, tokenizer: Any, **_: Any) -> None:
            self.processor, self.tokenizer = tokenizer, tokenizer.tokenizer

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            # The harness collects garbage after each batch: a quarter of a second for what was
            # there before, more than a small model needs for its answers.
            gc.freeze()
            try:
                return super().generate_until(requests, disable_tqdm)
            finally:
                gc.unfreeze()

    return LoadedMultimodal
