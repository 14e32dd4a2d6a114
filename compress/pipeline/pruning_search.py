"""The search for a pruning strategy inside a run: the whole 16-bit model, before any quantising.

Its trials lie in the run's work folder, so a run that was killed goes on searching where it was.

    found = searched_strategy(recipe, skeleton, start, work, mark, resume, "cpu", observer)
"""

from pathlib import Path
from typing import TYPE_CHECKING

from compress.observer import Observer
from compress.pruning.search import SearchResult, search_strategy
from compress.recipe.strategy import PruneStrategy

if TYPE_CHECKING:
    from compress.models.skeleton import Skeleton
    from compress.recipe.recipe import Recipe


def searched_strategy(
    recipe: "Recipe",
    skeleton: "Skeleton",
    start: PruneStrategy,
    work: Path,
    mark: str,
    resume: bool,
    device: str,
    observer: Observer,
) -> SearchResult:
    """What the recipe's search finds, on prompts of `calibration.dataset`.

    Args:
        start: what is not searched.
        work: where the trials are kept, and found again under the same `mark` if `resume`.

    Raises:
        UsageError, CompressError: as `search_strategy` does, and for data that cannot be read.
    """
    from compress.data.samples import read_samples
    from compress.loading.load import load

    pruning = recipe.prune_visual_tokens
    assert pruning is not None and pruning.search is not None and pruning.keep is not None
    settings = pruning.search
    model, processor = load(skeleton.folder, device=device, prune=False)
    path = recipe.resolve_path(recipe.calibration.dataset)
    prompts = read_samples(path, processor, settings.samples, settings.seed)
    trials = work / f"pruning-{mark[:16]}.jsonl"
    if not resume:
        trials.unlink(missing_ok=True)
    return search_strategy(
        model, prompts, pruning.keep, start=start, variables=settings.searched(),
        trials=settings.trials,
        sampler=settings.sampler, seed=settings.seed, path=trials, processor=processor,
        observer=observer,
    )  # fmt: skip
