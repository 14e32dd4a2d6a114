"""The checks' scripts, which know no more than transformers, each in a process of its own.

reported(SCRIPT, [folder, probe])["relative_error"]
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# glibc then gives every larger block back when it is freed; its heap would keep hundreds of MB.
AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


def reported(script: Path, arguments: Sequence[str]) -> dict[str, Any]:
    """The JSON object that the script prints; {"failure": why} of a process that prints none."""
    # -P: the script's folder must not become the child's first import path, or our
    # compressed_tensors.py would stand in for the compressed_tensors package.
    command = [sys.executable, "-P", str(script), *arguments]
    code, printed, complaints = completed(command, AT_ONCE | os.environ | OFFLINE)
    try:
        return json.loads(printed)
    except ValueError:  # killed, for want of memory perhaps, before it could report
        last = (complaints.strip().splitlines() or ["no message"])[-1]
        return {"failure": f"the process left with code {code}: {last}"}


def completed(command: Sequence[str], environment: Mapping[str, str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command that reads nothing."""
    child = subprocess.run(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="backslashreplace",
        check=False,
    )
    return child.returncode, child.stdout, child.stderr
