"""What pruned prompts cannot do, refused before it goes wrong: one clear line each.

check_inputs(inputs); model.generate = checked_generate(model, unpruned_length)
"""

import functools
from collections.abc import Callable
from inspect import signature
from typing import cast

from torch import Tensor
from transformers import Cache, PreTrainedModel

from compress.errors import UsageError
from compress.models.vision import Inputs

# Settings of `generate` that a pruned cache cannot follow, with the values that are fine.
GENERATE_SETTINGS: dict[str, tuple[str | int | None, ...]] = {
    "num_beams": (None, 1),
    "cache_implementation": (None, "dynamic", "dynamic_full", "offloaded"),
    "assistant_model": (None,),
    "assistant_early_exit": (None,),
    "use_mtp": (None, False),
    "prompt_lookup_num_tokens": (None,),
    "prefill_chunk_size": (None,),
}


def check_inputs(inputs: Inputs) -> None:
    """UsageError for a forward that cannot be pruned: another cache, mask or kind of input."""
    if inputs.get("input_ids") is None:
        raise UsageError("expected input_ids, found embeddings: the images' places are unknown")
    check_videos(inputs)
    mask = inputs.get("attention_mask")
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
        raise UsageError("expected a 2-D attention_mask [batch, tokens] or none, found another")
    cache = inputs.get("past_key_values")
    if cache is not None and (cache.is_compileable or any(cache.is_sliding)):
        raise UsageError(
            f"visual tokens cannot be pruned with a {type(cache).__name__} of fixed length: "
            "leave past_key_values and cache_implementation out, the cache is then dynamic"
        )


def check_videos(inputs: Inputs) -> None:
    """UsageError for a video, whether as pixels or encoded: `generate` encodes before a forward."""
    encoded = (inputs.get("mm_encoder_outputs") or {}).get("video")
    if inputs.get("pixel_values_videos") is not None or encoded is not None:
        raise UsageError("videos are pruned as images: give their frames as images")


def checked_generate(
    model: PreTrainedModel, unpruned_length: Callable[[Cache | None], int | None]
) -> Callable[..., object]:
    """`model.generate`, which refuses what a pruned cache cannot follow.

    unpruned_length: of a cache that holds fewer tokens than were given, how many were; else None.
    """
    original = cast(Callable[..., object], model.generate)

    @functools.wraps(original)
    def generate(*args: object, **kwargs: object) -> object:
        given = signature(original).bind_partial(*args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        check_videos(given)
        _check_settings(model, given)
        _check_continuation(given, unpruned_length)
        return original(*args, **kwargs)

    return generate


def _check_settings(model: PreTrainedModel, given: Inputs) -> None:
    # As `generate` does: what a given config leaves open is the model's own.
    configs = [given.get("generation_config"), model.generation_config]
    for name, fine in GENERATE_SETTINGS.items():
        settings = [getattr(config, name, None) for config in configs]
        value = given.get(name, next((x for x in settings if x is not None), None))
        if value not in fine:
            shown = value if isinstance(value, int | str) else type(value).__name__
            raise UsageError(
                f"visual tokens cannot be pruned with {name}={shown}: leave it out, or leave "
                "the pruning context"
            )


def _check_continuation(
    given: Inputs, unpruned_length: Callable[[Cache | None], int | None]
) -> None:
    """`generate` takes the cache's length for the number of tokens that it need not read again."""
    length = unpruned_length(given.get("past_key_values"))
    if length is None:
        return
    ids = given.get("inputs") if given.get("input_ids") is None else given["input_ids"]
    new = 0 if ids is None else ids.shape[1]
    mask = given.get("attention_mask")
    found = None if mask is None else mask.shape[1]
    if found != length + new:
        raise UsageError(
            f"a pruned cache goes on with the new tokens alone, and an attention_mask of all "
            f"{length} before them and the new: found {new} tokens and "
            f"{'no mask' if found is None else f'a mask of {found}'}"
        )
