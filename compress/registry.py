"""A named table of classes or functions: the one extension mechanism of the toolkit.

SOLVERS = Registry("solver")

@SOLVERS.register("gptq")
class Gptq: ...

SOLVERS["gptq"]       # an unknown name is a UsageError that lists the known ones

Tables whose names a recipe checks before torch is imported stand here, with the names that come
with the toolkit; the modules that fill them are imported when something is looked up.
"""

from collections.abc import Callable
from typing import Any, Generic, NoReturn, TypeVar

from compress.errors import UsageError, unknown

Entry = TypeVar("Entry")


class Registry(dict[str, Entry], Generic[Entry]):
    """A dict whose missing key is an error a person can act on.

    `shipped`: names that a module registers once it is imported.
    """

    def __init__(self, kind: str, shipped: tuple[str, ...] = ()):
        super().__init__()
        self.kind, self.shipped = kind, shipped

    def register(self, name: str) -> Callable[[Entry], Entry]:
        """Decorates the class or function that `name` stands for."""

        def add(entry: Entry) -> Entry:
            assert name not in self, f"{self.kind} {name!r} is registered twice"
            self[name] = entry
            return entry

        return add

    def names(self) -> list[str]:
        """All that may be asked for: what is shipped, then what others have registered."""
        return list(dict.fromkeys([*self.shipped, *self]))

    def __missing__(self, name: str) -> NoReturn:
        raise UsageError(self.unknown(name))

    def unknown(self, name: str) -> str:
        """The line for a name that is not known."""
        return unknown(self.kind, name, sorted(self.names()))


# Filled by `compress.importance.tokens`, which `compress.importance.weighting` imports.
TOKEN_IMPORTANCE: Registry[Any] = Registry(
    "token importance",
    (
        "uniform",
        "attention_concentration",
        "activation_norm",
        "activation_difference",
        "token_frequency",
        "token_similarity",
        "dot",
        "cluster",
        "first_n",
        "first_last_n",
        "chunks",
        "position",
    ),
)
# Filled by `compress.importance.layers`.
LAYER_IMPORTANCE: Registry[Any] = Registry(
    "layer importance",
    (
        "layer_embedding_change",
        "outlier_weight_count",
        "weight_error",
        "output_error",
        "hidden_state_error",
        "logit_divergence",
        "position",
        "random",
        "reverse",
    ),
)
