"""Arguments and options that several commands share: `device: DeviceOption = "auto"`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

import compress
from compress.cli.threads import set_threads


@dataclass
class Settings:
    """What `cli.main` must know of the command that it has started."""

    debug: bool = False


def _set_debug(context: typer.Context, value: bool) -> bool:
    if value:
        context.ensure_object(Settings).debug = True
    return value


def _print_version(value: bool) -> None:
    if value:
        print(f"modelpress {compress.__version__}")
        raise typer.Exit()


def _set_threads(value: int | None) -> int | None:
    if value is not None:
        set_threads(value)
    return value


DebugOption = Annotated[
    bool, typer.Option("--debug", callback=_set_debug, help="Show the traceback of an error.")
]
VersionOption = Annotated[
    bool,
    typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
]
RecipeArgument = Annotated[
    str, typer.Argument(help="A YAML file, or a name that `modelpress recipes` lists.")
]
RecipesArgument = Annotated[list[str], typer.Argument(help="Two or more recipes: files or names.")]
ModelArgument = Annotated[str, typer.Argument(help="A model folder or a hub id.")]
ModelOption = Annotated[
    str | None, typer.Option("--model", help="A model folder or hub id, instead of the recipe's.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set section.key=value; may be repeated."),
]
BudgetOption = Annotated[
    str | None, typer.Option("--budget", metavar="SIZE", help="Most the file may take, as 5GB.")
]
AverageBitsOption = Annotated[
    float | None, typer.Option("--average-bits", min=0, help="Bits a weight, over all layers.")
]
WidthsOption = Annotated[
    str | None, typer.Option("--widths", metavar="2,3,4", help="Bits that a layer may have.")
]
DeviceOption = Annotated[
    str, typer.Option(help="Where to compute: cpu, cuda, cuda:1; auto: a GPU where there is one.")
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        "--threads",
        min=1,
        callback=_set_threads,
        is_eager=True,
        help="Of a CPU; as many as it may use if absent.",
    ),
]
SelfCheckOption = Annotated[
    bool, typer.Option(help="Reload a result in a fresh process and compare logits.")
]
DenseOption = Annotated[
    bool, typer.Option("--dense", help="Expand quantised linears: no packed kernels, more memory.")
]
PackingOption = Annotated[
    bool | None,
    typer.Option(
        "--dense/--packed",
        help="Expand quantised linears, or keep them packed; what is faster here if absent.",
    ),
]
ActivationBitsOption = Annotated[
    int | None,
    typer.Option(
        "--activation-bits",
        min=2,
        max=8,
        help="Round what packed linears read to so many bits, token by token: faster, less exact.",
    ),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="One JSON object on stdout, all else on stderr.")
]
SeedOption = Annotated[int, typer.Option(min=0, help="Of everything random.")]
OutputFileOption = Annotated[Path | None, typer.Option(help="A JSON file for the result.")]
