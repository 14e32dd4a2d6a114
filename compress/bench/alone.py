"""A measurement in a process of its own: what others left in memory is not counted.

seconds = alone(measure, bench)
"""

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import ParamSpec, TypeVar

from compress.errors import CompressError

P = ParamSpec("P")
T = TypeVar("T")


def alone(measure: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What `measure`, a function of a module, returns or raises; what it prints goes to stderr.

    Raises CompressError if the process dies, of too little memory perhaps.
    """
    context = get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=os.dup2, initargs=(2, 1)) as pool:
        try:
            return pool.submit(measure, *args, **kwargs).result()
        except BrokenProcessPool as error:
            raise CompressError(
                "the process that measured was ended, for want of memory perhaps"
            ) from error
