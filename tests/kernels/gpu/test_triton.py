"""Runs `triton_cases.py` and `rounding_cases.py`, interpreted on the CPU, compiled on a GPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

CASES = [Path(__file__).with_name(f"{name}_cases.py") for name in ("triton", "rounding")]


def run_cases(*options: str, **environment: str) -> None:
    """The cases in a fresh process; its whole report is the failure's message."""
    child = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-p",
            "no:cacheprovider",
            *options,
            *map(str, CASES),
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )
    assert child.returncode == 0, child.stdout + child.stderr
    assert int(re.search(r"(\d+) passed", child.stdout)[1]) > 100


def test_interpreted():
    run_cases(TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_compiled():
    # what takes long is compiling, which processors do side by side
    run_cases("--numprocesses=logical", TRITON_INTERPRET="0")


def test_kernels_import_without_a_gpu_and_leave_the_device_alone():
    code = (
        "import compress.kernels.gpu.matmul, compress.kernels.gpu.hadamard, torch; "
        "print(torch.cuda.is_initialized())"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout.strip() == "False"
