"""llama.cpp's Q4_0, Q4_K_M, Q3_K_M and Q2_K, with and without an importance matrix.

It takes llama.cpp's programs, and an environment that borrows the project's packages and has what
llama.cpp's converter imports. The source distribution of llama-cpp-python holds llama.cpp whole:

    pip download --no-deps --no-binary llama-cpp-python llama-cpp-python==0.3.36
    tar xf llama_cpp_python-0.3.36.tar.gz
    cmake -S llama_cpp_python-0.3.36/vendor/llama.cpp -B BUILD -DCMAKE_BUILD_TYPE=Release \\
        -DBUILD_SHARED_LIBS=OFF -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF \\
        -DLLAMA_BUILD_SERVER=OFF -DGGML_OPENMP=OFF
    cmake --build BUILD --target llama-quantize llama-imatrix llama-perplexity

    python -m venv ENV
    echo "import site; site.addsitedir('PROJECT/lib/python3.X/site-packages')" \\
        > ENV/lib/python3.X/site-packages/project.pth
    ENV/bin/pip install --no-deps sentencepiece==0.2.3
    ENV/bin/python tests/interop/board/by_llamacpp.py \\
        llama_cpp_python-0.3.36/vendor/llama.cpp BUILD/bin MODEL TEXT OUT Q4_K_M-imatrix

TEXT is the folder that cut.py wrote; a case is a type of llama-quantize, with -imatrix behind it
for one of the calibration windows. Each converts the model to 16 bits first. All else is the
default, and so a row of 576 weights, which no K-quant divides, becomes another type; `tensors`
among the settings counts what the file holds.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import peer

TYPES = ("Q4_0", "Q4_K_M", "Q3_K_M", "Q2_K")
MIXTURES = TYPES[1:]
CASES = [*TYPES, *(f"{name}-imatrix" for name in MIXTURES)]
LENGTH = "512"  # tokens of a window
VERSIONS = {"llama.cpp": "in llama-cpp-python 0.3.36"}


def types_of(file: Path, source: Path) -> dict[str, int]:
    """How many tensors of each type a file has, by llama.cpp's own library."""
    sys.path.insert(0, str(source / "gguf-py"))
    from gguf import GGUFReader

    return dict(Counter(tensor.tensor_type.name for tensor in GGUFReader(file).tensors))


def make(asked: argparse.Namespace) -> None:
    kind, _, matrix = asked.case.partition("-")
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    settings = {"type": kind, "imatrix": bool(matrix)}
    name = f"llamacpp-{asked.case}"
    with (
        peer.making(asked, name, kind, settings, ("torch", "transformers"), VERSIONS) as folder,
        tempfile.TemporaryDirectory() as scratch,
    ):
        whole, importance = Path(scratch) / "bf16.gguf", Path(scratch) / "imatrix.gguf"
        converter = [sys.executable, asked.source / "convert_hf_to_gguf.py", "--outtype", "bf16"]
        steps = [[*converter, "--outfile", whole, asked.model]]
        if matrix:
            program = [asked.programs / "llama-imatrix", "-m", whole, "-o", importance]
            text = ["-f", asked.text / "windows.txt", "-c", LENGTH]
            steps.append([*program, *text, "-t", threads, "-tb", threads])
        program = [asked.programs / "llama-quantize"]
        program += ["--imatrix", importance] if matrix else []
        result = folder / "model.gguf"
        steps.append([*program, whole, result, kind, threads])
        for step in steps:
            subprocess.run(step, check=True, stdout=sys.stderr)
        settings["tensors"] = types_of(result, asked.source)


if __name__ == "__main__":
    make(peer.arguments(__doc__, CASES, folders=("source", "programs")))
