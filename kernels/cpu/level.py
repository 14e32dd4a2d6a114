"""MODELPRESS_CPU: how much of the processor the compiled kernels may use.

cpu_level()                        # "native" where nothing is said
"""

import os
import platform

LEVELS = {  # its values, and what the compiler is told
    "native": ("-march=native",),
    "avx2": ("-march=native", "-mno-avx512f", "-mno-avxvnni"),  # with them goes all of AVX-512
    "generic": ("-march=x86-64",),
}


def cpu_level() -> str:
    """MODELPRESS_CPU, `native` where it is not set. Raises ValueError for what it cannot be."""
    level = os.environ.get("MODELPRESS_CPU") or "native"
    if level not in LEVELS:
        raise ValueError(f"MODELPRESS_CPU: expected {', '.join(LEVELS)}, found {level!r}")
    if level != "native" and platform.machine().lower() not in ("x86_64", "amd64"):
        raise ValueError(
            f"MODELPRESS_CPU={level} is for x86-64 processors, this one is {platform.machine()}: "
            f"leave it out"
        )
    return level
