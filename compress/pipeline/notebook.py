"""What a run, a comparison or a measurement shows in a notebook, where no command line draws it.

observer = observer or observer_here()
with measured_here(): ...
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from compress.eval.progress import telling
from compress.observer import Observer


def observer_here() -> Observer:
    """Bars in a notebook; elsewhere one that is silent."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return Bars() if hasattr(shell, "kernel") else Observer()


@contextmanager
def measured_here() -> Iterator[None]:
    """Within it, a measurement in a notebook has a bar; elsewhere whoever listens goes on."""
    observer = observer_here()
    if not isinstance(observer, Bars):
        yield
        return
    with telling(observer.progress):
        yield


class Bars(Observer):
    """One bar of tqdm's for each stage."""

    def __init__(self) -> None:
        self._stage = ""
        self._bar: Any = None

    def stage(self, name: str) -> None:
        self._close()
        self._stage = name

    def layers(self, done: int, total: int) -> None:
        self._show(self._stage, done, total)

    def sample(self, done: int, total: int) -> None:
        self._show(self._stage, done, total)

    def generation(self, done: int, total: int, fitness: float) -> None:
        self._show("generations", done, total, kl=fitness)

    def trial(self, done: int, total: int, score: float, best: float) -> None:
        self._show("trials", done, total, best=best)

    def progress(self, what: str, done: int, total: int) -> None:
        self._show(what, done, total)

    def warning(self, text: str) -> None:
        print(f"warning: {text}", file=sys.stderr)

    def _show(self, what: str, done: int, total: int, **facts: float) -> None:
        from tqdm.auto import tqdm  # asks what the notebook can draw

        bar = self._bar
        if bar is None or (bar.desc, bar.total) != (f"{what}: ", total) or done < bar.n:
            self._close()
            bar = self._bar = tqdm(total=total, desc=what)
        bar.update(done - bar.n)
        if facts:
            bar.set_postfix(facts)
        if done >= total:
            self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
