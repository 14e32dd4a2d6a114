"""A layer's work shared by ranks: each has some of the tokens, and solves some of the rows.

A Hessian is the sum of those of all ranks, each over its own batches. One process adds its batches
up one after the other; so does `deterministic`: the sum goes from rank to rank, each of which adds
its batches to it, whose rows have waited meanwhile.

Output rows do not depend on one another (`solvers.py`), so a group's rows are cut into pieces,
which go to the rank that has least to do, the dearest piece first. A piece costs rows x columns^2
for each pass over the Hessian, and the first one on a rank columns^3 / 3 for its factor. What is
found goes to all ranks, since each runs its batches through the quantised layer. `deterministic`
cuts where one process does: products of other shapes may round otherwise.

    shares = shares_of(ranks, folder=None, sweeps=5)
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from compress.data.activations import ActivationStore
from compress.quantization.hessian import Hessian
from compress.quantization.shares import WHOLE, Piece, Whole
from compress.quantization.solvers import QuantizedLinear, rows_at_a_time
from compress.ranks import Ranks

SOLVING = 3  # passes over a Hessian beside the sweeps: the column loop, and two sums of errors


def shares_of(ranks: Ranks, folder: Path | None, sweeps: int) -> Whole:
    """What this process has of the work on linears that are refined in so many sweeps.

    `folder`: for rows that wait; None: they wait in memory.
    """
    return WHOLE if ranks.size == 1 else Shared(ranks, folder, sweeps + SOLVING)


class Shared(Whole):
    """One rank's share of the work.

    Args:
        folder: for rows that wait; None: they wait in memory.
        passes: over the Hessian, for rows that are solved.
    """

    def __init__(self, ranks: Ranks, folder: Path | None, passes: int):
        self.ranks, self.folder, self.passes = ranks, folder, passes
        self._names = (f"rows-{ranks.rank}-{number}" for number in count())
        self._free: list[str] = []  # names of files that nobody's rows wait in any more

    def hessian(self, columns: int, device: torch.device | str, drift: bool = False) -> Hessian:
        if self.ranks.first or not self.ranks.deterministic:
            return Hessian(columns, device, drift)
        name = self._free.pop() if self._free else next(self._names)
        return Waiting(columns, device, drift, self.folder, name)

    def complete(self, H: Hessian) -> None:
        if self.ranks.deterministic:
            self.ranks.in_turn(H.add_waiting if isinstance(H, Waiting) else _nothing, *H.sums())
        else:
            self.ranks.sum(*H.sums())
        H.of_windows(sum(self.ranks.collect(H.windows)))
        if isinstance(H, Waiting):
            self._free.append(H.rows.name)

    def total(self, counts: list[int]) -> list[int]:
        return [sum(each) for each in zip(*self.ranks.collect(counts), strict=True)]

    def parts(self, rows: slice, columns: int, device: torch.device) -> list[slice]:
        total = rows.stop - rows.start
        size = rows_at_a_time(total, columns, device.type)
        if not self.ranks.deterministic:
            size = min(size, -(-total // self.ranks.size))
        starts = range(rows.start, rows.stop, size)
        return [slice(start, min(start + size, rows.stop)) for start in starts]

    def solved(
        self,
        pieces: Sequence[Piece],
        columns: int,
        solve: Callable[[Iterable[int]], dict[int, QuantizedLinear]],
        device: torch.device,
    ) -> list[QuantizedLinear | None]:
        weights = [p.count * (1 if p.alternative else self.passes) for p in pieces]
        owners = dealt([w * columns**2 for w in weights], columns**3 / 3, self.ranks.size)
        found = solve(n for n, owner in enumerate(owners) if owner == self.ranks.rank)
        own = {f"{n}.{k}": t for n, part in found.items() for k, t in _tensors(part).items()}
        parts: dict[int, dict[str, Tensor]] = {}
        for name, tensor in self.ranks.gather(own).items():
            number, _, key = name.partition(".")
            parts.setdefault(int(number), {})[key] = tensor
        return [_linear(parts[n], device) if n in parts else None for n in range(len(pieces))]


class Waiting(Hessian):
    """A Hessian whose rows wait until those before them are in the sum."""

    def __init__(
        self,
        columns: int,
        device: torch.device | str,
        drift: bool,
        folder: Path | None,
        name: str,
    ):
        super().__init__(columns, device, drift)
        self.rows = ActivationStore(folder, name, summed=False)
        self.rows0 = ActivationStore(folder, f"{name}-0", summed=False)
        self.weights: list[Tensor | None] = []

    def add_batch(self, x: Tensor, weights: Tensor | None = None, x0: Tensor | None = None) -> None:
        """As that of a Hessian; the sum is changed by `add_waiting`."""
        self.rows.append(x)
        self.weights.append(weights)
        if self.drift is not None:
            assert x0 is not None, "a drift is one of two inputs"
            self.rows0.append(x0)

    def add_waiting(self) -> None:
        """Adds all that wait, in their order."""
        device = self.lower.device
        for i, w in enumerate(self.weights):
            x0 = None if self.drift is None else self.rows0[i].to(device)
            super().add_batch(self.rows[i].to(device), w, x0)
        self.weights = []
        self.rows.clear()
        self.rows0.clear()


def dealt(costs: Sequence[float], first: float, ranks: int) -> list[int]:
    """Who does what: the dearest goes to whoever is done with it soonest, and so on.

    `first`: what a rank's first piece costs beside its own cost.
    """
    loads, owners = [0.0] * ranks, [0] * len(costs)
    for number in sorted(range(len(costs)), key=lambda n: -costs[n]):
        ends = [(load or first) + costs[number] for load in loads]
        owner = min(range(ranks), key=ends.__getitem__)
        loads[owner], owners[number] = ends[owner], owner
    return owners


def _nothing() -> None:
    pass


def _tensors(part: QuantizedLinear) -> dict[str, Tensor]:
    """What was found, for another process."""
    tensors = {
        "codes": part.codes,
        "scale": part.scale,
        "zero": part.zero,
        "error": part.error,
        "power": part.power,
        "damping": None if part.damping is None else torch.tensor(part.damping, dtype=torch.double),
        "dead_columns": torch.tensor(part.dead_columns),
        "changed": torch.tensor(part.changed, dtype=torch.double),
    }
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _linear(tensors: dict[str, Tensor], device: torch.device) -> QuantizedLinear:
    """What `_tensors` was given, on this process's device."""

    def there(name: str) -> Tensor | None:
        return tensors[name].to(device) if name in tensors else None

    return QuantizedLinear(
        codes=tensors["codes"].to(device),
        scale=tensors["scale"].to(device),
        zero=there("zero"),
        error=there("error"),
        power=there("power"),
        damping=float(tensors["damping"]) if "damping" in tensors else None,
        dead_columns=int(tensors["dead_columns"]),
        changed=tuple(tensors["changed"].tolist()),
    )
