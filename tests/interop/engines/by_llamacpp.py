"""Asks llama.cpp, through its own `llama-perplexity`, on a CPU.

    LLAMA_PERPLEXITY=BIN TEXT=FILE python tests/interop/engines/by_llamacpp.py OUT CHECKPOINT

BIN is built from llama.cpp's source; FILE is the text that make.py was given. llama.cpp cuts it
into tokens itself, with the tokenizer in the file, and must come to the same windows. These are its
own kernels, which round the activations of each product to 8 bits, and its cache of keys and values
in fp16. It writes log probabilities of the second half of each window, in 16 bits: these 255 places
of a window are what is compared, and no tokens are generated.
"""

import os
import subprocess
import tempfile
from pathlib import Path

import asking
import numpy as np


def ask(asked: asking.Asked) -> asking.Answer:
    (file,) = asked.checkpoint.glob("*.gguf")
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "logits"
        command = [
            os.environ["LLAMA_PERPLEXITY"], "-m", str(file), "-f", os.environ["TEXT"],
            "-c", str(asking.LENGTH), "-b", str(asking.LENGTH), "--chunks", str(asking.WINDOWS),
            "-t", "1", "--save-all-logits", str(written),
        ]  # fmt: skip
        said = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if said.returncode:
            raise RuntimeError(said.stderr.strip().splitlines()[-1])
        return read(written.read_bytes(), asked.windows)


def read(data: bytes, windows: list[list[int]]) -> asking.Answer:
    """The file: "_logits_", three int32, the tokens; then for each place a scale, the least
    log probability, both fp32, and a uint16 for each token of the vocabulary.
    """
    if data[:8] != b"_logits_":
        raise RuntimeError("not a file of logits")
    length, vocabulary, count = np.frombuffer(data, np.int32, 3, 8)
    tokens = np.frombuffer(data, np.int32, length * count, 20).reshape(count, length)
    if tokens.tolist() != windows:
        raise RuntimeError("llama.cpp cuts the text into other tokens")
    places = length - 1 - length // 2
    row = np.dtype([("scale", "<f4"), ("least", "<f4"), ("steps", "<u2", (vocabulary,))])
    # Each place is padded to a whole number of 32-bit words.
    padded = row.itemsize + (vocabulary % 2) * 2
    raw = np.frombuffer(data, np.uint8, places * count * padded, 20 + 4 * length * count)
    rows = raw.reshape(count, places, padded)[..., : row.itemsize].copy().view(row)[..., 0]
    found = rows["scale"][..., None] * rows["steps"] + rows["least"][..., None]
    nexts = tokens[:, length // 2 + 1 :]
    nll = -np.take_along_axis(found, nexts[..., None], -1)[..., 0]
    return asking.Answer(nll.astype(float).round(6).tolist(), found.argmax(-1).tolist(), [])


def version() -> str:
    """As the program says it: 0.5.0-dev (build 1, commit 0c1e570)."""
    command = [os.environ["LLAMA_PERPLEXITY"], "--version"]
    said = subprocess.run(command, capture_output=True, text=True)
    return (said.stdout + said.stderr).partition("version: ")[2].splitlines()[0]


if __name__ == "__main__":
    asking.main("llamacpp", [], ask, **{"llama.cpp": version()})
