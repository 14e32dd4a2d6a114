"""From encoded images to a prompt's placeholders: which visual tokens belong to which features.

`generate` encodes the images before the forward and hands on features alone, so the images' sizes
are only known where features are made: a wrapper round one model's `get_image_features` reads the
tap there, and the features themselves lead from the forward back to what the tap saw.

    images = EncodedImages(tap); base.get_image_features = images.noting(base.get_image_features)
"""

from collections.abc import Callable, Iterable
from functools import wraps
from inspect import signature
from typing import ParamSpec

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from compress.errors import CompressError, UsageError
from compress.models.vision import Inputs
from compress.pruning.per_thread import PerThread
from compress.pruning.prompt import PromptImage
from compress.pruning.tower import VisionTap, VisualTokens

P = ParamSpec("P")
Encoder = Callable[P, BaseModelOutputWithPooling | tuple]


class EncodedImages:
    """The images of this thread's latest call of `get_image_features`."""

    def __init__(self, tap: VisionTap):
        self.tap = tap
        self._latest = PerThread[list[tuple[Tensor, list[VisualTokens]]]](list)

    @property
    def latest(self) -> list[tuple[Tensor, list[VisualTokens]]]:
        """Features as the model has them, and what is known of the images that they are of."""
        return self._latest.value

    def noting(self, encode: Encoder[P]) -> Encoder[P]:
        """`encode`, which also notes what became of each image."""

        @wraps(encode)
        def get_image_features(
            *args: P.args, **kwargs: P.kwargs
        ) -> BaseModelOutputWithPooling | tuple:
            inputs = signature(encode).bind_partial(*args, **kwargs).arguments
            output = encode(*args, **kwargs)
            self._latest.value = _grouped(_features(output), self.tap.images(inputs))
            return output

        return get_image_features

    def begin(self, inputs: Inputs) -> None:
        """Before a forward over a prompt: one without ready features will encode its own images."""
        if ready_features(inputs) is None:
            self._latest.value = []

    def placed(self, inputs: Inputs, image_token: int) -> list[PromptImage]:
        """The images of a forward at their placeholders in `input_ids` [B, L], nothing pruned.

        Raises:
            UsageError: features that this context did not see being made.
            CompressError: placeholders and visual tokens differ in number.
        """
        ids: Tensor = inputs["input_ids"]
        places = (ids == image_token).nonzero()  # [tokens of all images, 2]
        if len(places) == 0:
            return []
        found = self._tokens(ready_features(inputs))
        sizes = list(map(len, found))
        if sum(sizes) != len(places):
            raise CompressError(
                f"the images give {sum(sizes)} visual tokens, the prompt has {len(places)} "
                "placeholders: give the images with the prompt"
            )
        images = []
        for tokens, place in zip(found, places.split(sizes), strict=True):
            place = place.to(tokens.segment.device)
            images.append(PromptImage(int(place[0, 0]), place[:, 1], tokens))
        return images

    def _tokens(self, ready: BaseModelOutputWithPooling | None) -> list[VisualTokens]:
        if ready is None:
            return [tokens for _, images in self.latest for tokens in images]
        # `generate` may have repeated the features, for several answers to one prompt; where one
        # tensor holds those of all images, it has copied them.
        alike = torch.equal if isinstance(ready.pooler_output, Tensor) else _same
        return [tokens for features in _features(ready) for tokens in self._known(features, alike)]

    def _known(
        self, features: Tensor, alike: Callable[[Tensor, Tensor], bool]
    ) -> list[VisualTokens]:
        for known, images in self.latest:
            if alike(known, features):
                return images
        raise UsageError(
            "image features from elsewhere: give pixel_values, or encode the images last and "
            "inside the pruning context"
        )


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b


def _grouped(
    features: Iterable[Tensor], images: list[VisualTokens]
) -> list[tuple[Tensor, list[VisualTokens]]]:
    """Each of the features with its images: one, or all of a prompt (Idefics3)."""
    left, result = iter(images), []
    for found in features:
        group: list[VisualTokens] = []
        while sum(map(len, group)) < len(found):
            group.append(next(left))
        result.append((found, group))
    return result


def ready_features(inputs: Inputs) -> BaseModelOutputWithPooling | None:
    """The image encoder's output that a forward is given, if any."""
    return (inputs.get("mm_encoder_outputs") or {}).get("image")


def _features(output: BaseModelOutputWithPooling | tuple) -> Iterable[Tensor]:
    """Of each image."""
    features = output[1] if isinstance(output, tuple) else output.pooler_output
    assert features is not None  # image encoders give them
    return features
