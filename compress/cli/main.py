"""The program `modelpress`: runs a command line, and turns what it raises into a line and a code.

    main(["run", "demo-rsq", "--output", "out"])

Exit codes: 0 done; 1 the run failed; 2 the command or the recipe is wrong; 130 interrupted, by
Ctrl-C, SIGTERM or SIGHUP. An error is one line on stderr; --debug puts its traceback before it.
With --json, stdout holds one JSON object and all else is on stderr; progress and warnings are there
always.

A command parses, calls the library and prints; it decides nothing. Each group has its file.
"""

import contextlib
import errno
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

import typer
from tqdm import tqdm

from compress.cli.bench import bench
from compress.cli.checkpoints import export, families, generate, inspect, push, recipes
from compress.cli.common import InterruptError, add_command, expanded
from compress.cli.measure import BARE, MEASURED, compare, evaluate, lm_eval
from compress.cli.options import DebugOption, Settings, VersionOption
from compress.cli.run import plan, run
from compress.cli.search_pruning import search_pruning
from compress.cli.threads import settle
from compress.errors import CompressError, UsageError
from compress.loading.processor import check_cpu_level
from compress.ranks import RankError, has_spoken, launched, speaks

# Libraries under us report to logs and bars of their own; a setting of the user's wins.
QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}
ParserError: Any = typer.BadParameter.__base__  # click's UsageError, wherever this typer keeps it

# Commands whose work the ranks of a launcher share.
SHARED = ("run", "eval", "lm-eval", "compare", "search-pruning")

app = typer.Typer(
    name="modelpress",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Makes language models smaller and faster, and measures what that cost.",
)


@app.callback()
def _top(
    context: typer.Context, version: VersionOption = False, debug: DebugOption = False
) -> None:
    # The options' callbacks do their work; the help is that of `app`.
    rank, ranks = launched()
    if ranks > 1 and context.invoked_subcommand not in SHARED:
        if rank > 0:
            raise typer.Exit()
        raise UsageError(
            f"WORLD_SIZE={ranks}: {context.invoked_subcommand} runs in one process, and ranks "
            f"would do the same {ranks} times: start it without torchrun or accelerate "
            f"({', '.join(SHARED)} share their work)"
        )


add_command(app, run)
add_command(app, plan)
add_command(app, expanded(evaluate, MEASURED), "eval")
# All of its arguments are lm-eval's, --help as well.
passed_on = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
app.command("lm-eval", context_settings=passed_on, add_help_option=False)(lm_eval)
for command in (compare, export, inspect, generate, recipes, families, push, search_pruning):
    add_command(app, command)
app.add_typer(bench, name="bench")  # last in the help


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line (None: that of the process) and returns its exit code."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    settle()
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a file's names need not be characters
            stream.reconfigure(errors="backslashreplace")
    settings = Settings()
    try:
        given = sys.argv[1:] if argv is None else list(argv)
        arguments = [f"{word}={BARE[word]}" if word in BARE else word for word in given]
        bars = contextlib.nullcontext() if "lm-eval" in given[:1] else _no_bars()
        if arguments and not {"--help", "--version"} & {*arguments}:
            check_cpu_level()
        with bars, _interrupted_by_signals():
            code = app(arguments, prog_name="modelpress", standalone_mode=False, obj=settings)
        sys.stdout.flush()  # here, where a closed pipe can still be handled
    except ParserError as error:
        return _explain_usage(error)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", InterruptError.exit_code)
    except BrokenPipeError:
        return _leave_quietly()
    except Exception as error:
        if settings.debug:
            traceback.print_exc()
        return explain(error, settings.debug)
    if code == InterruptError.exit_code:  # typer turns the exception into its code
        return _fail("interrupted", InterruptError.exit_code)
    return code if isinstance(code, int) else 0


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Switches off the bars that heed no variable: compressed-tensors', lm-eval's.

    Downloads have theirs in a terminal, where minutes would pass in silence.
    """
    original = tqdm.__init__

    def disabled(self: tqdm, *args: Any, **options: Any) -> None:
        downloads = type(self).__module__.startswith("huggingface_hub") and sys.stderr.isatty()
        original(self, *args, **options | ({} if downloads else {"disable": True}))

    tqdm.__init__ = disabled
    try:
        yield
    finally:
        tqdm.__init__ = original


@contextlib.contextmanager
def _interrupted_by_signals() -> Iterator[None]:
    """Lets SIGTERM and SIGHUP end a command as Ctrl-C does, and say how to continue.

    Only the first of them: what follows while the command ends is ignored. A SIGHUP that was
    ignored from the start (`nohup`) stays so.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {getattr(signal, name): signal.getsignal(getattr(signal, name)) for name in names}
    caught = [number for number, handler in before.items() if handler is signal.SIG_DFL]

    def interrupt(number: int, frame: FrameType | None) -> None:
        for each in caught:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in caught:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        if launched()[1] == 1:  # one of several has yet to say why it ends, or to hear it said
            for number in caught:
                signal.signal(number, signal.SIG_DFL)


def explain(error: Exception, debug: bool) -> int:
    """One line for what a command raised."""
    if isinstance(error, InterruptError):
        return _fail(f"interrupted: {error}", error.exit_code)
    if isinstance(error, CompressError):
        return _fail(f"error: {error}", error.exit_code, heard=isinstance(error, RankError))
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where = f" for {error.filename}" if error.filename else ""
        return _fail(f"error: the disk is full{where}: free some space and run this again", 1)
    hint = "" if debug else " (give --debug for the traceback)"
    return _fail(f"error: {type(error).__name__}: {error}{hint}", 1)


def _explain_usage(error: Any) -> int:
    """One line for a command that typer cannot parse; nothing where it has printed the help."""
    message = error.format_message().rstrip(".")
    if message:
        command = error.ctx.command_path if error.ctx else "modelpress"
        _fail(f"error: {message} (see `{command} --help`)", 2)
    return 2


def _fail(message: str, code: int, heard: bool = False) -> int:
    """Prints a line, once for all ranks; `heard`: from another one, which may print it itself."""
    if speaks(heard):
        with contextlib.suppress(OSError):  # a terminal that was closed
            print(" ".join(message.split()), file=sys.stderr, flush=True)
        has_spoken()
    return code


def _leave_quietly() -> int:
    """The reader of our output has gone: nothing to say, and nobody to say it to."""
    with contextlib.suppress(OSError, ValueError):  # a stdout without a descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1
