"""What a run, a search or a comparison tells while it goes on; the command line draws it.

class Silent(Observer): ...      # every method may be left out
"""

from collections.abc import Mapping
from typing import Any


class Observer:
    """Hears what goes on. Every method does nothing here and may be ignored."""

    def stage(self, name: str) -> None:
        """A stage begins: `layers`, `writing`, `self-check`, ..."""

    def layers(self, done: int, total: int) -> None:
        """So many decoder layers of a pass are done."""

    def module(self, name: str, facts: Mapping[str, Any]) -> None:
        """A linear is quantised: its width, error, damping, as modelpress.json has them."""

    def generation(self, done: int, total: int, fitness: float) -> None:
        """So many generations of `evolve` are done; `fitness`: the least KL, nats per token."""

    def sample(self, done: int, total: int) -> None:
        """So many prompts of a strategy search have been run unpruned."""

    def progress(self, what: str, done: int, total: int) -> None:
        """So many windows of a text, or requests of lm-eval, are done."""

    def resumed(self, trials: int) -> None:
        """So many trials of an earlier strategy search are there already."""

    def trial(self, done: int, total: int, score: float, best: float) -> None:
        """So many trials of a strategy search are done; mean cosines, of the last and the best."""

    def warning(self, text: str) -> None:
        """Something out of the ordinary, in one line."""
