"""What a run shows while it goes on, on stderr.

In a terminal: a bar over the layers, and below it the module that was quantised last. Elsewhere (a
log file, a pipe): one line a stage and one line a layer, and nothing that moves.

    with RunProgress(console) as progress:
        run(recipe, "out", observer=progress)
"""

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from compress.eval.report import format_number, format_seconds
from compress.observer import Observer

BETWEEN_LINES = 20.0  # seconds, of a measurement, where nothing moves


class RunProgress(Observer):
    """Draws a run, a search, or several one after the other, on a console."""

    def __init__(self, console: Console):
        self.console = console
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            console=console,
        )
        self.task = self.bar.add_task("", total=None, count="")
        self.last_module = Text("")
        self.live = Live(Group(self.bar, self.last_module), console=console, transient=True)
        self.current = ""  # stage
        self.errors: list[float] = []  # of this layer's modules
        self.started: float | None = None  # this layer
        self.walked: list[float] = []  # seconds of each layer of this walk
        self.counted, self.done = ("", 0), 0  # what is measured, and how far it is
        self.began = self.told = 0.0  # when that began, when a line was last printed

    def __enter__(self) -> "RunProgress":
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.live.stop()

    def stage(self, name: str) -> None:
        self.current, self.started, self.walked = name, None, []
        self.last_module.plain = ""
        self.bar.remove_task(self.task)
        self.task = self.bar.add_task(name, total=None, count="")
        if not self.console.is_terminal:
            self._line(name)

    def layers(self, done: int, total: int) -> None:
        now = time.perf_counter()
        if self.started is not None:
            self.walked.append(now - self.started)
        left = ""
        if self.walked and done < total:
            seconds = sum(self.walked) / len(self.walked) * (total - done)
            left = f"  {format_seconds(seconds)} left"
        self._count(done, total, left)
        if self.started is None and done:
            self._line(f"continuing after layer {done}/{total}")
        elif self.started is not None and not self.console.is_terminal:
            line = f"layer {done}/{total}  {now - self.started:.1f} s"
            if self.errors:
                error = sum(self.errors) / len(self.errors)
                line += f"  mean relative error {format_number(error)}"
            self._line(line + left)
        self.errors, self.started = [], now

    def module(self, name: str, facts: Mapping[str, Any]) -> None:
        if "bits" not in facts:  # no module but a measured model, with its figures
            figures = (f"{figure} {format_number(value)}" for figure, value in facts.items())
            self._line(f"{name}: {', '.join(figures)}")
            return
        error = facts.get("error")
        if error is not None:
            self.errors.append(error)
        self.last_module.plain = (
            f"{name}  {facts['bits']} bits  relative error {format_number(error)}  "
            f"{facts['seconds']:.1f} s"
        )

    def generation(self, done: int, total: int, fitness: float) -> None:
        self._searched(done, total, "generation", f"KL {format_number(fitness)} nats per token")

    def sample(self, done: int, total: int) -> None:
        self._count(done, total)

    def progress(self, what: str, done: int, total: int) -> None:
        if not done:  # nothing to reckon by
            return
        now = time.perf_counter()
        if self.counted != (what, total) or done < self.done:  # a count begins
            self.counted, self.began, self.told = (what, total), now, now
        self.done = done
        left = (now - self.began) / done * (total - done)
        self._count(done, total)
        self.bar.update(self.task, description=f"{self.current} {what}".strip())
        line = f"{what} {done}/{total}  {format_seconds(left)} left"
        if self.console.is_terminal:
            self.last_module.plain = line
        elif now - self.told >= BETWEEN_LINES:
            self.told = now
            self._line(line)

    def resumed(self, trials: int) -> None:
        self._line(f"continuing after trial {trials}")

    def trial(self, done: int, total: int, score: float, best: float) -> None:
        self._searched(done, total, "trial", f"cosine {score:.6f}  best {best:.6f}")

    def _count(self, done: int, total: int, left: str = "") -> None:
        self.bar.update(self.task, completed=done, total=total, count=f"{done}/{total}{left}")

    def _searched(self, done: int, total: int, what: str, found: str) -> None:
        self._count(done, total)
        line = f"{what} {done}/{total}  {found}"
        if self.console.is_terminal:
            self.last_module.plain = line
        else:
            self._line(line)

    def warning(self, text: str) -> None:
        self._line(f"warning: {text}", style="yellow")

    def _line(self, text: str, style: str | None = None) -> None:
        # Soft: the terminal wraps a long line, not we, so that it can be copied and searched for.
        self.console.print(text, style=style, soft_wrap=True, markup=False, highlight=False)
