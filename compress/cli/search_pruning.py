"""`modelpress search-pruning`: finds a strategy for visual-token pruning.

Every import that needs torch is inside the command.
"""

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compress.cli.common import Answer, integers, interruptible, names
from compress.cli.console import console, pairs_table, print_lines
from compress.cli.options import DenseOption, DeviceOption, ModelArgument, SeedOption
from compress.cli.progress import RunProgress
from compress.errors import UsageError
from compress.memory import chosen_device
from compress.ranks import together
from compress.storage.lease import file_lease, lease

if TYPE_CHECKING:  # needs torch
    from transformers import PreTrainedModel

    from compress.models.vision import Inputs
    from compress.pruning.search import SearchResult
    from compress.pruning.tower import Processor


def search_pruning(
    model: ModelArgument,
    data: Annotated[
        Path,
        typer.Option(
            metavar="FILE.jsonl", help='Lines {"image": path, "prompt": text}; or demo-scenes.'
        ),
    ],
    keep: Annotated[float, typer.Option(help="Share of visual tokens, averaged over layers.")],
    output: Annotated[Path, typer.Option(help="The strategy; its trials go beside it.")] = Path(
        "pruning.json"
    ),
    samples: Annotated[int, typer.Option(min=1, help="Prompts, at most.")] = 30,
    trials: Annotated[int, typer.Option(min=1)] = 50,
    sampler: Annotated[str, typer.Option(help="tpe or gp.")] = "tpe",
    stages: Annotated[
        str | None, typer.Option(metavar="0,9,18", help="Decoder layers; 0: before them.")
    ] = None,
    start: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="A strategy: what is not searched.")
    ] = None,
    variables: Annotated[
        str | None,
        typer.Option(help="Of ratios,voter_threshold,entropy_weight,cell; all if absent."),
    ] = None,
    save: Annotated[
        bool, typer.Option("--save", help="Keep the strategy in the model's folder, too.")
    ] = False,
    dense: DenseOption = False,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    resume: Annotated[bool, typer.Option(help="Go on with the trials that are there.")] = True,
) -> Answer:
    """Find which visual tokens to prune: the strategy that changes the last state least.

    Started by torchrun (torchrun --nproc-per-node 2 -m compress search-pruning MODEL), the ranks
    share the prompts.
    """
    if save and not Path(model).is_dir():
        raise UsageError(f"--save needs a model folder, {model} is none")
    if stages is not None and start is not None:
        raise UsageError("--stages and --start: the strategy of --start has its own stages")
    from compress.recipe.strategy import PruneStrategy, with_new_names  # --help is quicker without

    given = None if start is None else PruneStrategy.load(start)
    layers = None if stages is None else _rising("--stages", stages)
    searched = None if variables is None else with_new_names(names(variables))
    from compress.data.samples import DEMO_SCENES
    from compress.pruning.search import check_search, search_strategy

    device = chosen_device(device)
    check_search(keep, trials, sampler)
    if str(data) != DEMO_SCENES and not data.is_file():
        raise UsageError(f"--data: no such file: {data}")
    tried = output.with_suffix(".trials.jsonl")
    kept = "run the same command again; finished trials are kept"
    err = console(stderr=True)
    with interruptible(lambda: kept), together(device) as ranks:
        loaded, processor, prompts = _subject(model, device, dense, data, samples, seed)
        if layers is not None:
            depth = loaded.config.get_text_config().num_hidden_layers
            given = PruneStrategy.for_budget("vflowopt", keep, depth, stages=layers)
        if not resume and ranks.first:
            with file_lease(tried):
                tried.unlink(missing_ok=True)
        if len(prompts) < samples:
            print_lines(err, f"{data} has {len(prompts)} prompts, fewer than {samples}")
        with RunProgress(err) as progress:
            found = search_strategy(
                loaded,
                prompts,
                keep,
                start=given,
                variables=searched,
                trials=trials,
                sampler=sampler,
                seed=seed,
                path=tried,
                processor=processor,
                observer=progress,
                ranks=ranks,
            )
        if ranks.first:
            _save(found, output, model if save else None)
    rows = [*_rows(found), ("strategy", str(output)), ("trials", str(tried))]
    if save:
        rows.append(("saved with", model))
    return Answer(found.as_dict(), lambda out: out.print(pairs_table(rows)))


def _subject(
    model: str, device: str, dense: bool, data: Path, samples: int, seed: int
) -> "tuple[PreTrainedModel, Processor, list[Inputs]]":
    """The model, its processor, and the prompts that it is searched on."""
    from compress.data.samples import read_samples
    from compress.loading.load import load
    from compress.pruning.families import tower_of

    loaded, processor = load(model, device=device, prune=False, packed=False if dense else None)
    tower_of(loaded)  # refuses a text model, whose tokenizer takes no images
    return loaded, processor, read_samples(data, processor, samples, seed)


def _save(found: "SearchResult", output: Path, model: str | None) -> None:
    """Writes the strategy to a file of its own, and into a model's folder."""
    from compress.pruning.saved import save_strategy

    output.parent.mkdir(parents=True, exist_ok=True)
    found.strategy.save(output)
    if model is not None:
        with lease(Path(model)):
            save_strategy(found.strategy, model)


def _rows(found: "SearchResult") -> list[tuple[str, str]]:
    strategy, conditions = found.strategy, found.conditions
    rows = [
        ("mean cosine", f"{found.score:.6f} over {conditions['prompts']} prompts"),
        ("kept", f"{found.keep:.4g} of {conditions['visual_tokens']} visual tokens"),
        ("stages", ", ".join(map(str, strategy.stages))),
        ("ratios", ", ".join(f"{ratio:.4f}" for ratio in strategy.ratios)),
    ]
    searched = [name for name in conditions["variables"] if name != "ratios"]
    return rows + [(name, f"{getattr(strategy, name):.4g}") for name in searched]


def _rising(option: str, text: str) -> tuple[int, ...]:
    expected = "rising layers such as 0,9,18"
    layers = integers(option, text, expected)
    if any(a >= b for a, b in pairwise((-1, *layers))):
        raise UsageError(f"{option}: expected {expected}, found {text!r}")
    return tuple(layers)
