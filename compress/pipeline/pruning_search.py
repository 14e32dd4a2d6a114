"""The search for a pruning strategy inside a run: the whole 16-bit model, before any quantising.

Its trials lie in the run's work folder, so a run that was killed goes on searching where it was.

    found = searched_strategy(section, source, folder, start, work, mark, resume, "cpu", observer)
"""

from pathlib import Path

from compress.data.samples import read_samples
from compress.data.source import CalibrationSource
from compress.loading.load import load
from compress.observer import Observer
from compress.pruning.search import SearchResult, search_strategy
from compress.recipe.pruning import PruneVisualTokens
from compress.recipe.strategy import PruneStrategy


def searched_strategy(
    section: PruneVisualTokens,
    source: CalibrationSource,
    folder: Path,
    start: PruneStrategy,
    work: Path,
    mark: str,
    resume: bool,
    device: str,
    observer: Observer,
) -> SearchResult:
    """What the section's search finds, on prompts of the calibration data.

    Args:
        folder: of the source model.
        start: what is not searched.
        work: where the trials are kept, and found again under the same `mark` if `resume`.

    Raises:
        UsageError, CompressError: as `search_strategy` does, and for data that cannot be read.
    """
    assert section.search is not None and section.keep is not None
    settings = section.search
    model, processor = load(folder, device=device, prune=False)
    prompts = read_samples(source.location, processor, settings.samples, settings.seed)
    trials = work / f"pruning-{mark[:16]}.jsonl"
    if not resume:
        trials.unlink(missing_ok=True)
    return search_strategy(
        model,
        prompts,
        section.keep,
        start=start,
        variables=settings.variables,
        trials=settings.trials,
        sampler=settings.sampler,
        seed=settings.seed,
        path=trials,
        processor=processor,
        observer=observer,
    )
