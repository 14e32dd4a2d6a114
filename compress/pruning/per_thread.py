"""State that belongs to the forward that a thread is in: other threads have their own.

seen = PerThread(dict); seen.value["pixels"] = pixels
"""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class PerThread(threading.local, Generic[T]):
    """One `value` for each thread; each begins with what `make` gives."""

    def __init__(self, make: Callable[[], T]):
        """Python calls this anew in each thread that looks, with the same `make`."""
        self.value: T = make()
