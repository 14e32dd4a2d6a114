"""What runs take of memory beside what their plans promise, each in a process of its own.

Libraries are imported once, in a process of this file, and every run is a fork of it. Pages of
library files count as LIBRARIES everywhere: a fork maps them again as it meets them, and how many a
process maps depends on how the kernel caches the files (310 MB right after an installation).

    with measuring() as measure:
        found = measure(config, sections, text)      # {"promised": ..., "peak": ..., "start": ...}
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from compress.memory import release_memory

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
TINY = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 260,
}
LIBRARIES = 201 * 10**6  # bytes of their files that a process has mapped, as in FIXED_MEMORY
MEASURED = Callable[[Path, dict[str, Any], dict[str, Any]], dict[str, float]]


@contextmanager
def measuring() -> Iterator[MEASURED]:
    """Yields folder, config, sections -> megabytes."""
    process = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    assert process.stdin is not None and process.stdout is not None

    def measure(folder: Path, config: dict[str, Any], sections: dict[str, Any]) -> dict[str, float]:
        process.stdin.write(json.dumps([str(folder), config, sections]) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        assert line, "the process that measures has ended"
        found = json.loads(line)
        assert "error" not in found, found["error"]
        return found

    with process:
        yield measure
        process.stdin.close()


def measured_alone(folder: Path, sections: dict[str, Any]) -> dict[str, float]:
    """The same in a process that imports libraries itself; the model is there."""
    command = [sys.executable, __file__, str(folder), json.dumps(sections)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=ENVIRONMENT)
    return json.loads(done.stdout.splitlines()[-1])


def status(key: str) -> int:
    """Bytes, of a line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def write_model(folder: Path, config: dict[str, Any]) -> None:
    """Weights of the config's shapes that repeat themselves, quick to make."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from support.tiny_checkpoints import byte_tokenizer

    settings = dict(config)
    dtype = getattr(torch, settings.pop("dtype", "bfloat16"))
    made = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(made, dtype=dtype)
    model = model.to_empty(device="cpu").eval()
    some = torch.randn(100_003, generator=torch.Generator().manual_seed(0)).mul_(0.05).to(dtype)
    for parameter in model.parameters():
        if parameter.ndim < 2:
            parameter.data.fill_(0.9)
        else:
            flat = parameter.data.view(-1)
            for start in range(0, flat.numel(), len(some)):
                flat[start : start + len(some)] = some[: flat.numel() - start]
    for _, buffer in model.named_buffers():
        buffer.zero_()
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def write_text(file: Path, kilobytes: int) -> Path:
    """Made-up words, the same every time; from 20 kB on they repeat themselves."""
    import numpy as np

    draw = np.random.default_rng(0)
    words = ["".join(draw.choice([*"aeiourstln"], draw.integers(2, 8))) for _ in range(400)]
    text = " ".join(draw.choice(words, 4000))
    file.write_text((text * (kilobytes * 1000 // len(text) + 1))[: kilobytes * 1000])
    return file


def forked(work: Callable[[], dict[str, float] | None]) -> dict[str, Any]:
    """What `work` gives in a child of this process."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            found: dict[str, Any] = work() or {}
        except BaseException as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        os.write(writing, json.dumps(found).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return json.loads(text or '{"error": "the run was killed"}')


def run_here(folder: Path, sections: dict[str, Any]) -> dict[str, float]:
    """One run in this process."""
    from compress.observer import Observer
    from compress.pipeline.inputs import RunInputs
    from compress.pipeline.plan import make_plan
    from compress.pipeline.run import run
    from compress.recipe.recipe import Recipe

    recipe = Recipe.from_dict({"model": str(folder / "model")} | sections)
    promised = make_plan(RunInputs.open(recipe)).peak_memory["host"]
    run(recipe, folder / "out", self_check=False, check_source=False, observer=Observer())
    peak = status("VmHWM") - status("RssFile") + LIBRARIES
    return {"promised": promised / 1e6, "peak": peak / 1e6}


def serve() -> None:
    """Lines of folder, config and sections from stdin; a line for each to stdout."""
    out = os.dup(1)
    os.dup2(2, 1)  # what is printed on the way is no result
    imported = False
    for line in sys.stdin:
        place, config, sections = json.loads(line)
        folder = Path(place)
        folder.mkdir(parents=True, exist_ok=True)
        if not imported:
            with TemporaryDirectory() as first:
                write_model(Path(first) / "model", TINY)
                text = write_text(Path(first) / "text.txt", 20)
                calibration = {"dataset": str(text), "samples": 4, "length": 32}
                run_here(Path(first), {"calibration": calibration})
            release_memory()
            imported = True
        if not (folder / "model").exists():
            forked(partial(write_model, folder / "model", config))
        found = forked(partial(run_here, folder, sections))
        os.write(out, (json.dumps(found) + "\n").encode())


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    if len(sys.argv) > 1:
        print(json.dumps(run_here(Path(sys.argv[1]), json.loads(sys.argv[2]))))
    else:
        serve()
