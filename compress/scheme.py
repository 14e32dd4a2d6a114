"""How one linear is quantised: the one vocabulary of recipes, plans, solvers and formats.

Scheme(3, 128)                       # 3 bits, a scale for each 128 inputs, symmetric
PlannedModule("model.layers.0.mlp.up_proj", (N, K), Scheme(3, 128)).weights
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Scheme:
    """How one linear is quantised; `group_size` None is one scale per output channel.

    What others may have written, and is never written here:
    activation_bits: of its input, rounded token by token as the model runs; None leaves it as it
    is. per_tensor: one scale for all outputs. act_order: each input has a group of its own choice.
    """

    bits: int
    group_size: int | None
    symmetric: bool = True
    activation_bits: int | None = None
    per_tensor: bool = False
    act_order: bool = False


@dataclass(frozen=True)
class PlannedModule:
    """One linear that will be quantised: its weight's shape (out, in) = (N, K), and how.

    `score`: its importance, where widths are chosen by one; higher = keep more bits. `format`: how
    its codes are stored. `twin`: the module whose codes these are too, in the file once.
    """

    name: str
    shape: tuple[int, int]
    scheme: Scheme
    score: float | None = None
    format: str = "pack-quantized"
    twin: str | None = None

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def bits(self) -> int:
        return self.scheme.bits

    def as_dict(self) -> dict[str, Any]:
        """As `inspect` lists a module, with its score."""
        scheme = self.scheme
        return {
            "name": self.name,
            "shape": self.shape,
            "bits": scheme.bits,
            "group_size": scheme.group_size,
            "symmetric": scheme.symmetric,
            "score": self.score,
        }
