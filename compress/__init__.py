"""Makes language models smaller and faster, and measures what that cost.

    recipe = compress.Recipe.load("recipes/demo-lm.yaml")
    result = compress.run(recipe, output="out")
    model, tokenizer = compress.load("out")

Names are imported when they are first used (PEP 562), so `import compress` is quick and needs
neither torch nor transformers; `from compress import run` works all the same.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.checkpoint.hub import push
    from compress.checkpoint.loading import inspect, load
    from compress.comparison import compare
    from compress.errors import CompressError, UsageError
    from compress.evaluation import evaluate
    from compress.pipeline import run
    from compress.planning import Plan
    from compress.recipe import Recipe
    from compress.result import RunResult

    __version__: str

_HOMES = {
    "Recipe": "compress.recipe",
    "run": "compress.pipeline",
    "RunResult": "compress.result",
    "load": "compress.checkpoint.loading",
    "inspect": "compress.checkpoint.loading",
    "evaluate": "compress.evaluation",
    "compare": "compress.comparison",
    "push": "compress.checkpoint.hub",
    "CompressError": "compress.errors",
    "UsageError": "compress.errors",
}

__all__ = [
    "CompressError",
    "Recipe",
    "RunResult",
    "UsageError",
    "__version__",
    "compare",
    "evaluate",
    "inspect",
    "load",
    "plan",
    "push",
    "run",
]


def plan(recipe: "Recipe") -> "Plan":
    """What `run` would do: bits of each module, bytes, peak memory and problems.

    Reads the model's config and headers alone. Raises UsageError for a model that cannot be
    opened; what would stop the run itself is in `problems`.
    """
    from compress.models.skeleton import Skeleton
    from compress.planning import make_plan

    return make_plan(recipe, Skeleton.open(recipe.model_location(), recipe.model.revision))


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("modelpress")
    elif name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value  # asked once
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
