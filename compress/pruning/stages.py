"""A strategy at work on a prompt: which of its images' tokens stay at each stage.

The live engine (`compress.pruning.engine`) and the calibration walk, which has one decoder layer in
memory at a time, prune with the same stages.

    stages = Stages(strategy, layers=28); tap = stages.tap(base, tower, processor)
    hidden, order = stages.narrow(prompt, layer, hidden, generator)
"""

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from compress.pruning import baselines  # noqa: F401  fills the registry
from compress.pruning.families import Tower
from compress.pruning.methods import PRUNING_METHODS, Candidates, PruningMethod, Selection
from compress.pruning.prompt import PrunedPrompt, take, take_positions
from compress.pruning.tower import Processor, TapSettings, VisionTap
from compress.recipe.strategy import PruneStrategy


def seed_of(*numbers: int) -> int:
    """A seed of torch's, of numbers that say what is drawn for: each tells another sequence."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


class Stages:
    """The stages of a strategy; `numbers`: decoder layer that a stage lies before -> stage.

    `layers`: of the decoder.
    """

    def __init__(self, strategy: PruneStrategy, layers: int):
        self.strategy, self.layers = strategy, layers
        self.method: PruningMethod = PRUNING_METHODS[strategy.method](strategy)
        self.numbers = {layer: stage for stage, layer in enumerate(strategy.stages)}

    def tap(
        self, base: PreTrainedModel, tower: Tower, processor: Processor | None = None
    ) -> VisionTap:
        """What reads the strategy's signals off the vision tower of `base`.

        processor: only the entropy term asks it, for the pixels' mean and deviation.
        """
        settings = TapSettings(
            signals=self.method.signals,
            voter_threshold=self.strategy.voter_threshold,
            voter_quantile=self.strategy.voter_quantile,
            vote=self.strategy.vote,
            entropy_weight=self.strategy.entropy_weight,
            layer=self.strategy.vit_layer,
            **_pixel_statistics(processor),
        )
        return tower(base, settings)

    def narrow(
        self,
        prompt: PrunedPrompt,
        layer: int,
        hidden: Tensor,
        generator: torch.Generator,
        scores: Tensor | None = None,
        added: dict[int, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Selects in every image before `layer`.

        An image with fewer tokens than its share and its protected ones need keeps the least that
        is possible, and is marked `at_least`.

        Args:
            hidden: [B, S, D], what would enter the layer.
            generator: on the CPU.
            scores: [B, S], attention from the prompts' last tokens, for methods that rank by it.
            added: [B, S, D] each, what later layers add to the hidden states; changed in the dict
                as these are.

        Returns:
            The hidden states [B, S', D] that stay, and their slots [B, S'] among the S; None in
            place of the slots if all stay.
        """
        slots, added = prompt.slots(), {} if added is None else added
        for image in prompt.images:
            here = slots[image.row, image.positions[image.alive]]
            counts = self.strategy.counts(len(image.tokens), self.layers)
            stage = self.numbers[layer]
            count = counts[stage]
            empty = self.strategy.stage_without(len(image.tokens))
            image.at_least |= empty is not None and empty <= stage
            if count < len(here):
                tokens = image.tokens.take(image.alive)
                protect = self.strategy.protect_newlines
                protected = tokens.newline if protect else torch.zeros_like(tokens.newline)
                candidates = Candidates(
                    features=hidden[image.row, here],
                    tokens=tokens,
                    protected=protected,
                    stage=stage,
                    generator=generator,
                    language_attention=None if scores is None else scores[image.row, here],
                )
                least = int(protected.sum())
                if least > count:
                    image.at_least = True
                    selection = Selection(protected.nonzero()[:, 0])
                else:
                    selection = self.method.select(candidates, count)
                image.not_recycled |= selection.not_recycled
                if selection.mix is not None and len(selection.merged):
                    image.merged = image.alive[selection.merged]
                    places, values = here[selection.merged], selection.values
                    hidden = _with(hidden, image.row, places, values)
                    for number, x in added.items():
                        mixed = selection.mix(x[image.row, here])
                        added[number] = _with(x, image.row, places, mixed)
                image.alive = image.alive[selection.kept]
            image.kept.append((layer, len(image.alive)))
        order = prompt.narrow(layer)
        if order is None:
            return hidden, None
        for number, x in added.items():
            added[number] = take(x, order)
        return take(hidden, order), order

    def positions(
        self, prompt: PrunedPrompt, layer: int, positions: Tensor, order: Tensor
    ) -> Tensor:
        """Position ids of the tokens that stay from `layer` on: [..., B, S'].

        `renumbered` counts them anew before the language model; later stages keep what is there.
        """
        kept = take_positions(positions, order)
        if layer > 0 or self.strategy.positions == "original":
            return kept
        return (prompt.view(0).valid.cumsum(1) - 1).clamp(min=0).expand_as(kept)


def _with(x: Tensor, row: int, places: Tensor, values: Tensor | None) -> Tensor:
    """x [B, S, D] with values [r, D] at places [r] of a row; the given one is not changed."""
    assert values is not None, "a selection that mixes has them"
    x = x.clone()
    x[row, places] = values.to(x.dtype)
    return x


def _pixel_statistics(processor: Processor | None) -> dict[str, Tensor]:
    if processor is None:
        return {}
    images = getattr(processor, "image_processor", processor)
    names = {"pixel_mean": "image_mean", "pixel_std": "image_std"}
    return {name: torch.tensor(getattr(images, key)) for name, key in names.items()}
