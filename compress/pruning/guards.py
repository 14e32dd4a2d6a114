"""What pruned prompts cannot do, refused before it goes wrong: one clear line each.

check_inputs(inputs); model.generate = checked_generate(model)
"""

import functools
from typing import Any

from torch import Tensor

from compress.errors import UsageError
from compress.pruning.vision import Inputs

# Settings of `generate` that a pruned cache cannot follow, with the values that are fine.
GENERATE_SETTINGS: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "cache_implementation": (None, "dynamic", "dynamic_full"),
    "assistant_model": (None,),
    "prompt_lookup_num_tokens": (None,),
    "prefill_chunk_size": (None,),
}


def check_inputs(inputs: Inputs) -> None:
    """UsageError for a forward that cannot be pruned: another cache, mask or kind of input."""
    if inputs.get("input_ids") is None:
        raise UsageError("expected input_ids, found embeddings: the images' places are unknown")
    if inputs.get("pixel_values_videos") is not None:
        raise UsageError("videos are pruned as images: give their frames as images")
    mask = inputs.get("attention_mask")
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
        raise UsageError("expected a 2-D attention_mask [batch, tokens] or none, found another")
    cache = inputs.get("past_key_values")
    if cache is not None and (cache.is_compileable or any(cache.is_sliding)):
        raise UsageError(
            f"visual tokens cannot be pruned with a {type(cache).__name__} of fixed length: "
            "leave past_key_values and cache_implementation out, the cache is then dynamic"
        )


def checked_generate(model: Any) -> Any:
    """`model.generate`, which refuses what a pruned cache cannot follow."""
    original = model.generate

    @functools.wraps(original)
    def generate(*args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("generation_config") or model.generation_config
        for name, fine in GENERATE_SETTINGS.items():
            value = kwargs.get(name, getattr(config, name, None))
            if value not in fine:
                shown = value if isinstance(value, int | str) else type(value).__name__
                raise UsageError(
                    f"visual tokens cannot be pruned with {name}={shown}: leave it out, or leave "
                    "the pruning context"
                )
        return original(*args, **kwargs)

    return generate
