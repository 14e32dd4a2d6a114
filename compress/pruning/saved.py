"""A strategy that belongs to a checkpoint: kept in its folder, applied when it is loaded.

`visual_token_pruning` of config.json holds every setting and travels with the config; pruning.json
is the same as a file of its own. One of them is enough; if they differ, loading is an error.

Applied, a strategy is the context of `compress.prune_visual_tokens`, open on this one model and
held by it as `model.visual_token_pruning`; no class is changed.

    save_strategy(strategy, "out")
    model, processor = compress.load("out"); model.visual_token_pruning.stats
    stop_pruning(model)
"""

from pathlib import Path

from transformers import PretrainedConfig, PreTrainedModel

from compress.errors import CheckpointError, UsageError
from compress.models.pretrained import load_config
from compress.pruning.engine import VisualTokenPruning, prune_visual_tokens
from compress.pruning.families import tower_for
from compress.pruning.tower import Processor
from compress.recipe.strategy import PruneStrategy
from compress.storage.files import read_json, write_json

KEY = "visual_token_pruning"  # of config.json, and the name of the model's attribute
FILE = "pruning.json"


def save_strategy(strategy: PruneStrategy, folder: str | Path) -> None:
    """Writes the strategy into a model's folder, instead of one that is there.

    Raises UsageError if the folder holds no model that the strategy can prune.
    """
    folder = Path(folder)
    path = folder / "config.json"
    try:
        config = read_json(path)
    except CheckpointError as error:
        raise UsageError(f"{folder} holds no model: {error}") from error
    if config is None:
        raise UsageError(f"{folder} holds no model: it has no config.json")
    tower_for(str(config.get("model_type")))
    depth = load_config(folder).get_text_config().num_hidden_layers
    strategy.average_kept(depth)  # refuses a stage beyond the last layer
    settings = strategy.model_dump(mode="json")
    write_json(folder / FILE, settings)
    write_json(path, config | {KEY: settings})


def saved_strategy(config: PretrainedConfig, path: str | Path) -> PruneStrategy | None:
    """The strategy of a checkpoint, None if it has none.

    Args:
        config: its transformers config.
        path: its folder, or hub id: of a hub model only the config is read.

    Raises:
        RecipeError: a strategy with settings that do not exist; the message names the file.
        CheckpointError: config.json and pruning.json differ.
    """
    file, settings = Path(path) / FILE, getattr(config, KEY, None)
    beside = PruneStrategy.load(file) if file.is_file() else None
    if settings is None:
        return beside
    place = f"{Path(path) / 'config.json'}: {KEY}"
    if not isinstance(settings, dict):
        raise CheckpointError(f"{place}: expected the settings of a strategy, found {settings!r}")
    strategy = PruneStrategy.from_dict(settings, place)
    if beside is not None and beside != strategy:
        raise CheckpointError(
            f"{file} and {KEY} of config.json are two strategies: remove one of them"
        )
    return strategy


def apply_strategy(
    model: PreTrainedModel, strategy: PruneStrategy, processor: Processor | None = None
) -> None:
    """Prunes all prompts of this model from now on, until `stop_pruning`.

    Raises UsageError as `prune_visual_tokens` does.
    """
    context = prune_visual_tokens(model, strategy, processor).__enter__()
    setattr(context.model, KEY, context)  # not on a wrapper, which finds it there


def stop_pruning(model: PreTrainedModel) -> None:
    """Undoes `apply_strategy`, and what `load` did of it: the model is as it was.

    Raises UsageError if nothing was applied.
    """
    context = getattr(model, KEY, None)
    if not isinstance(context, VisualTokenPruning):
        raise UsageError("no strategy was applied to this model")
    context.__exit__(None, None, None)
    delattr(context.model, KEY)
