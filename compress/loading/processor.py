"""The processor that compiled kernels are for, checked before anything slow is imported."""

from compress.errors import UsageError
from compress.kernels.cpu.level import cpu_level


def check_cpu_level() -> None:
    """UsageError for a MODELPRESS_CPU that this processor has not."""
    try:
        cpu_level()
    except ValueError as error:
        raise UsageError(str(error)) from error
