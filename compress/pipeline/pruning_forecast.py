"""What pruning visual tokens will do in a run, before any weight is read.

The strategy for the depth of the model, what would make it fail, and its costs for one prompt: the
first of the calibration prompts, or else an image of the size that the vision tower takes.

    planned, problems, notes = forecast(inputs, layers=28)
"""

import math
from itertools import groupby
from typing import Any, TypedDict

from compress.data.samples import DEMO_SCENES, read_samples
from compress.data.source import CalibrationSource
from compress.errors import CompressError, UsageError
from compress.models.skeleton import Skeleton
from compress.pipeline.inputs import RunInputs
from compress.pruning.costs import DecoderShape, kv_bytes, prefill_flops
from compress.pruning.families import images_of_runs, tokens_of_a_crop, tower_for
from compress.pruning.last_token import LastTokenAttention, check_decoder
from compress.pruning.saved import saved_strategy
from compress.pruning.search import check_search, search_variables
from compress.pruning.stages import Stages
from compress.recipe.pruning import PruneVisualTokens
from compress.recipe.strategy import PruneStrategy

SECTION = "prune_visual_tokens"
TEXT_TOKENS = 32  # of a prompt that is made up, beside its image
VISUAL_TOKENS = 1024  # of an image where its size decides, and none is given


class PruningCosts(TypedDict):
    """The strategy, and what it costs for one prompt."""

    strategy: dict[str, Any]
    searched: bool
    average_kept: float  # share of visual tokens, averaged over layers
    prompt: dict[str, str | int]  # its source, tokens and visual_tokens
    kept: list[int]  # visual tokens at each decoder layer
    prefill_flops: int
    prefill_flops_unpruned: int
    kv_bytes: int
    kv_bytes_unpruned: int


class PruningForecast(PruningCosts):
    """Costs with a line for a person."""

    summary: str


def strategy_of(
    section: PruneVisualTokens | None, skeleton: Skeleton, layers: int
) -> PruneStrategy | None:
    """The strategy that the result prunes by: the recipe's, or else the one saved with the source.

    Raises UsageError for one that a model of so many decoder layers cannot follow.
    """
    if skeleton.spec.vision is None:
        if section is None:
            return None
        raise UsageError(
            f"{skeleton.model_config.model_type!r} models see no images: leave the section out"
        )
    if section is not None:
        strategy = section.strategy_for(layers)
    else:
        found = saved_strategy(skeleton.model_config, skeleton.folder)
        if found is None:
            return None
        strategy = found
    strategy.average_kept(layers)  # refuses a stage beyond the last layer
    tower, base = tower_for(skeleton.model_config.model_type), skeleton.base
    decoder = skeleton.spec.layers.rpartition(".")[0]
    check_decoder(skeleton.model.get_submodule(decoder))
    Stages(strategy, layers).tap(base, tower)
    if strategy.ranks_by_language_attention:
        first = f"{skeleton.spec.layers}.0.{skeleton.spec.layer(0).attention}"
        LastTokenAttention(skeleton.model.get_submodule(first))
    return strategy


def forecast(inputs: RunInputs, layers: int) -> tuple[PruningForecast | None, list[str], list[str]]:
    """What is planned (None if nothing is pruned), problems, and notes, a line each.

    The first note is the plan's `summary`. Never raises.
    """
    try:
        section = inputs.recipe.prune_visual_tokens
        strategy = strategy_of(section, inputs.skeleton, layers)
        _check_data(section, inputs.source)
        if strategy is None:
            return None, [], []
        _check_search(section, strategy)
        costs = _costs(inputs, strategy, layers)
    except CompressError as error:
        place = "" if str(error).startswith(("calibration", SECTION)) else f"{SECTION}: "
        return None, [f"{place}{error}"], []
    planned: PruningForecast = {**costs, "summary": _summary(costs)}
    return planned, [], [planned["summary"], *_notes(inputs, planned)]


def calibration_tokens(source: CalibrationSource, skeleton: Skeleton) -> int:
    """Tokens of all calibration data: exact for text, estimated from the first prompt of images."""
    c = source.settings
    if not source.images:
        return c.samples * c.expansion * c.length
    try:
        total, _, _ = _prompt(source, skeleton)
    except CompressError:  # the run will say what is wrong with the file
        total = c.length
    return c.samples * total


def _check_data(section: PruneVisualTokens | None, source: CalibrationSource) -> None:
    """UsageError for settings of `calibration` that prompts with images do not have."""
    c, images = source.settings, source.images
    if section is not None and section.search is not None and not images:
        raise UsageError(
            f"search needs prompts with images: expected calibration.dataset to be {DEMO_SCENES} "
            f'or a FILE.jsonl of lines {{"image": path, "prompt": text}}, found {c.dataset!r}'
        )
    if images and (c.expansion > 1 or c.bos):
        name = "expansion" if c.expansion > 1 else "bos"
        raise UsageError(
            f"calibration.{name}: is for windows of text, and {c.dataset} holds prompts with "
            "images: leave it out"
        )


def _check_search(section: PruneVisualTokens | None, strategy: PruneStrategy) -> None:
    if section is not None and section.search is not None:
        assert section.keep is not None
        check_search(section.keep, section.search.trials, section.search.sampler)
        search_variables(strategy, section.search.variables)


def _prompt(source: CalibrationSource, skeleton: Skeleton) -> tuple[int, list[int], str]:
    """Tokens of one prompt, the visual tokens of each of its images, and what prompt it is."""
    if source.images:
        processor, seed = skeleton.processor(), source.settings.seed
        found = read_samples(source.location, processor, 1, seed, answers=source.answers)
        ids = found[0]["input_ids"][0]
        token = skeleton.model_config.image_token_id
        parts = groupby((ids == token).tolist())
        runs = [len(list(run)) for is_image, run in parts if is_image]
        images = images_of_runs(skeleton.model_config, runs)
        return len(ids), images, f"a prompt of {source.settings.dataset}"
    crop = tokens_of_a_crop(skeleton.model_config)
    if crop is not None:
        count, side = crop
        described = f"one crop of {side} x {side} pixels"
    else:
        count, described = VISUAL_TOKENS, "an image"
    return count + TEXT_TOKENS, [count], f"{described} and {TEXT_TOKENS} tokens of text"


def _costs(inputs: RunInputs, strategy: PruneStrategy, layers: int) -> PruningCosts:
    total, images, source = _prompt(inputs.source, inputs.skeleton)
    crop = tokens_of_a_crop(inputs.skeleton.model_config)
    if crop is not None:  # no image has fewer tokens than one crop
        strategy.check_tokens(crop[0])
    counts = [sum(c) for c in zip(*(strategy.counts(n, layers) for n in images), strict=True)]
    visual = sum(images)
    kept = [visual] * strategy.stages[0]
    ends = [*strategy.stages[1:], layers]
    for count, start, end in zip(counts, strategy.stages, ends, strict=True):
        kept += [count] * (end - start)
    shape = DecoderShape.of(inputs.skeleton.config, inputs.dtype.itemsize)
    tokens = [total - visual + n for n in kept]
    section = inputs.recipe.prune_visual_tokens
    return {
        "strategy": strategy.model_dump(mode="json"),
        "searched": section is not None and section.search is not None,
        "average_kept": strategy.average_kept(layers),
        "prompt": {"source": source, "tokens": total, "visual_tokens": visual},
        "kept": kept,
        "prefill_flops": prefill_flops(shape, tokens),
        "prefill_flops_unpruned": prefill_flops(shape, [total] * layers),
        "kv_bytes": kv_bytes(shape, tokens),
        "kv_bytes_unpruned": kv_bytes(shape, [total] * layers),
    }


def _summary(planned: PruningCosts) -> str:
    strategy, prompt = planned["strategy"], planned["prompt"]
    steps = ", ".join(
        f"{planned['kept'][layer]} from layer {layer}" for layer in strategy["stages"]
    )
    flops = planned["prefill_flops"] / planned["prefill_flops_unpruned"]
    cache = planned["kv_bytes"] / planned["kv_bytes_unpruned"]
    return (
        f"visual tokens: {planned['average_kept']:.1%} kept on average by {strategy['method']}; of "
        f"{prompt['visual_tokens']} ({prompt['source']}) {steps}; prefill takes {flops:.1%} of "
        f"{_short(planned['prefill_flops_unpruned'])} FLOPs, the KV cache {cache:.1%} of "
        f"{_short(planned['kv_bytes_unpruned'])}B"
    )


def _notes(inputs: RunInputs, planned: PruningCosts) -> list[str]:
    notes = []
    if inputs.recipe.prune_visual_tokens is None:
        notes.append("the strategy is the one saved with the model; the result keeps it")
    if planned["searched"]:
        notes.append("the search for a strategy holds the whole 16-bit model in memory")
    if not inputs.source.images and inputs.recipe.quantize.method == "gptq":
        notes.append(
            "calibration data holds no images: the Hessians are those of text, which is not pruned"
        )
    strategy, visual = PruneStrategy.from_dict(planned["strategy"]), planned["prompt"]
    if strategy.stage_without(int(visual["visual_tokens"])) is not None:
        notes.append(
            f"a share of the {visual['visual_tokens']} visual tokens of {visual['source']} is less "
            "than one token: one stays"
        )
    return notes


def _short(number: int) -> str:
    """1,234,567 as `1.23M`."""
    power = min(int(math.log10(max(number, 1))) // 3, 5)
    return f"{number / 1000**power:.3g}{' KMGTP'[power].strip()}"
