"""Makes language models smaller and faster, and measures what that cost.

    result = compress.run("demo-lm", output="out")
    model, tokenizer = compress.load("out")

Names are imported when they are first used (PEP 562), so `import compress` is quick and needs
neither torch nor transformers; `from compress import run` works all the same.
"""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from compress.errors import CheckpointError, UsageError

if TYPE_CHECKING:  # what `__getattr__` gives
    from compress.checkpoint.inspect import inspect as inspect
    from compress.comparison.compare import compare as compare
    from compress.errors import CompressError as CompressError
    from compress.loading.load import load as load
    from compress.loading.transformers_plugin import ModelpressConfig as ModelpressConfig
    from compress.observer import Observer
    from compress.pipeline.evaluation import evaluate as evaluate
    from compress.pipeline.plan import Plan
    from compress.pipeline.publishing import export as export
    from compress.pipeline.publishing import push as push
    from compress.pipeline.result import RunResult as RunResult
    from compress.pipeline.run import run as run
    from compress.pruning.engine import prune_visual_tokens as prune_visual_tokens
    from compress.pruning.pictures import draw_pruning as draw_pruning
    from compress.pruning.saved import stop_pruning as stop_pruning
    from compress.pruning.search import search_strategy as search_strategy
    from compress.recipe.recipe import Recipe as Recipe
    from compress.recipe.strategy import PruneStrategy as PruneStrategy

    __version__: str

_HOMES = {
    "Recipe": "compress.recipe.recipe",
    "run": "compress.pipeline.run",
    "RunResult": "compress.pipeline.result",
    "load": "compress.loading.load",
    "inspect": "compress.checkpoint.inspect",
    "evaluate": "compress.pipeline.evaluation",
    "compare": "compress.comparison.compare",
    "export": "compress.pipeline.publishing",
    "push": "compress.pipeline.publishing",
    "prune_visual_tokens": "compress.pruning.engine",
    "PruneStrategy": "compress.recipe.strategy",
    "stop_pruning": "compress.pruning.saved",
    "draw_pruning": "compress.pruning.pictures",
    "search_strategy": "compress.pruning.search",
    "ModelpressConfig": "compress.loading.transformers_plugin",
    "CompressError": "compress.errors",
    "UsageError": "compress.errors",
}

__all__ = ["__version__", "plan", *_HOMES]


def plan(
    recipe: "Recipe | str | Path | Mapping[str, object]",
    *,
    model: "str | Path | None" = None,
    device: str = "cpu",
    observer: "Observer | None" = None,
    check_source: bool = False,
    time: bool = False,
) -> "Plan":
    """What `run` would do: bits of each module, bytes, peak memory and problems.

    The recipe is one, the name of a shipped one, a file, or a dict; `model` replaces its model.
    Reads the model's config and headers alone, conversations to calibrate on, and what the scores
    of an `allocate` section need. A folder of config.json alone will do; of a hub model no weights
    are fetched.
    `check_source` reads the weights as well: our forward must give the logits of transformers.
    `time` does pieces of the run's work on this machine, a few seconds long, for `Plan.time`.
    Raises UsageError for a model that cannot be opened; what would stop the run itself is in
    `problems`.
    """
    from compress.pipeline.plan import (  # when first used, as all below
        allocated_plan,
        calibration_forecast,
        make_plan,
        open_for_plan,
    )
    from compress.pipeline.source_check import check_source as check  # the same
    from compress.recipe.recipe import Recipe  # the same

    inputs = open_for_plan(Recipe.of(recipe, model), device, check_source)
    checked, problems = None, []
    if check_source:
        try:
            checked = check(inputs, make_plan(inputs).peak_memory["host"])
        except CheckpointError as error:
            problems.append(str(error))
    planned = allocated_plan(inputs, observer=observer)
    planned.source_check = checked
    try:
        planned.calibration = calibration_forecast(inputs)
    except UsageError as error:
        problems.append(str(error))
    planned.problems += problems
    if time and not planned.problems:
        from compress.bench.run_time import time_forecast  # the same

        planned.time = time_forecast(inputs).as_dict()
    return planned


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version  # slow to import

        value: object = version("modelpress")
    elif name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value  # asked once
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
