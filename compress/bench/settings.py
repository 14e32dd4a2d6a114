"""What each benchmark measures: its settings, the options of its command. Imports no torch.

A field has the type, the default and, as its annotation, the option; behind that may stand what
makes its value of the command line's text. A field without an option is one that commands share
(`compress.cli.options`), or none.
"""

from dataclasses import dataclass
from typing import Annotated

from typer import Option

from compress.errors import UsageError


def parse_numbers(text: str, option: str) -> tuple[int, ...]:
    """`1,2,16` as numbers of at least 1. Raises UsageError, naming the option."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"{option}: expected numbers above 0, comma-separated, found {text!r}")
    return tuple(int(part) for part in parts)


def parse_shapes(text: str, option: str) -> tuple[tuple[int, int], ...]:
    """`4096x4096,8192x2048` as (outputs, inputs). Raises UsageError."""
    shapes = []
    for part in text.split(","):
        numbers = parse_numbers(part.lower().replace("x", ","), option)
        if len(numbers) != 2:
            raise UsageError(f"{option}: expected NxK,... such as 4096x4096, found {part!r}")
        shapes.append((numbers[0], numbers[1]))
    return tuple(shapes)


def parse_shares(text: str, option: str) -> tuple[float, ...]:
    """`1,0.25` as numbers. Raises UsageError for what are none."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{option}: expected shares such as 1,0.25, found {text!r}") from None


def parse_group_size(text: str, option: str) -> int | None:
    """`128`, or `channel`: one scale per output, None. Raises UsageError."""
    return None if text == "channel" else parse_numbers(text, option)[0]


def number_or_name(text: str, option: str) -> int | str:
    """`128` as a number; what else there may be, the recipe says."""
    return int(text) if text.isdecimal() else text


Widths = Annotated[tuple[int, ...], Option(metavar="2,3,...", help="Widths."), parse_numbers]
GroupSize = Annotated[int | None, Option(help="A number, or channel."), parse_group_size]


@dataclass(frozen=True)
class QuantizeBench:
    """The synthetic model (a random Llama, bf16 on disk), the calibration and the method."""

    hidden: Annotated[int, Option(min=1)] = 1024
    mlp: Annotated[int, Option(min=1, help="Width between up and down.")] = 2816
    layers: Annotated[int, Option(min=1)] = 8
    heads: Annotated[int, Option(min=1)] = 16
    kv_heads: Annotated[int, Option(min=1)] = 8
    vocabulary: Annotated[int, Option(min=2)] = 512
    samples: Annotated[int, Option(min=1, help="Calibration windows.")] = 32
    length: Annotated[int, Option(min=2, help="Tokens per window.")] = 512
    bits: Annotated[int, Option()] = 4
    group_size: Annotated[int | str, Option(help="A number, or channel."), number_or_name] = 128
    refine_sweeps: Annotated[int, Option(min=0)] = 5
    rotate: Annotated[str, Option(help="none, hadamard or random.")] = "none"
    token_importance: Annotated[str, Option(help="As in a recipe.")] = "uniform"
    offload: Annotated[str, Option(help="Activations: disk, ram or auto.")] = "disk"
    device: str = "cpu"


@dataclass(frozen=True)
class KernelBench:
    """What to measure of packed products; None takes what is usual for the device."""

    shapes: Annotated[
        tuple[tuple[int, int], ...] | None,
        Option(metavar="NxK,...", help="Outputs x inputs."),
        parse_shapes,
    ] = None
    rows: Annotated[
        tuple[int, ...] | None, Option("--m", metavar="1,2,...", help="Rows of x."), parse_numbers
    ] = None
    bits: Widths = (2, 3, 4, 8)
    group_size: GroupSize = 128
    dtype: Annotated[
        str | None, Option(help="Of activations: fp16, bf16, fp32; default by device.")
    ] = None
    activation_bits: Annotated[
        int | None, Option(help="Time products of integers too, tokens rounded so.")
    ] = None
    rounds: Annotated[int, Option(min=1, help="Samples of each figure.")] = 15
    device: str = "cpu"


@dataclass(frozen=True)
class CompiledBench:
    """Which GPU kernels are compiled, and for which compute capability."""

    capability: Annotated[
        str, Option(metavar="X.Y", help="Compute capability: 9.0 is an H100.")
    ] = "9.0"
    bits: Widths = (2, 3, 4, 8)
    group_size: GroupSize = 128
    dtype: Annotated[str, Option(help="Of activations: fp16, bf16, fp32.")] = "fp16"


@dataclass(frozen=True)
class PruningBench:
    """What is measured: a checkpoint in `model`, or a random LLaVA of the given sizes.

    `dense` expands a checkpoint's quantised linears.
    """

    model: Annotated[str | None, Option(metavar="MODEL", help="A multimodal checkpoint.")] = None
    width: Annotated[int, Option(min=64, help="Of its language model.")] = 1024
    layers: Annotated[int, Option(min=1, help="Of its language model.")] = 8
    visual_tokens: Annotated[int, Option(min=4, help="A square number.")] = 1024
    text_tokens: Annotated[int, Option(min=1, help="Of its prompt.")] = 32
    vocabulary: int = 512
    image: Annotated[int, Option(min=16, help="Side in pixels, for a checkpoint.")] = 336
    method: Annotated[str, Option(help="As in a recipe.")] = "vflowopt"
    keep: Annotated[
        tuple[float, ...], Option(metavar="A,B,C", help="Shares kept."), parse_shares
    ] = (1.0, 0.5, 0.25, 0.1)
    new_tokens: Annotated[int, Option(min=1, help="Decoded after each prefill.")] = 16
    repeats: Annotated[int, Option(min=1, help="Samples of each figure.")] = 5
    dense: bool = False
    seed: int = 0
    device: str = "cpu"


@dataclass(frozen=True)
class ModelBench:
    """What is measured of whole models, which are folders or hub ids.

    `dense` and `activation_bits` are those of `compress.load`, and of `model` alone.
    """

    model: str
    baseline: Annotated[
        str | None, Option(metavar="MODEL", help="Measured beside it: the 16-bit model.")
    ] = None
    prompts: Annotated[
        tuple[int, ...], Option(metavar="A,B,C", help="Tokens of the prompts."), parse_numbers
    ] = (1, 16, 64, 256)
    new_tokens: Annotated[int, Option(min=1, help="Decoded behind the longest.")] = 16
    repeats: Annotated[int, Option(min=1, help="Samples of each figure.")] = 7
    dtype: Annotated[str, Option(help="Of activations: bf16, fp16, fp32.")] = "bf16"
    dense: bool = False
    activation_bits: int | None = None
    seed: int = 0
    device: str = "cpu"
