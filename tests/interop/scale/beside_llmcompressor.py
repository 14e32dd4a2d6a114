"""How long a run takes beside llm-compressor, in turn on the same machine: GPTQ of one model.

    python tests/interop/scale/beside_llmcompressor.py ENV/bin/python [MODEL TEXT] [--dtype float32]

ENV is made as board/by_llmcompressor.py says. MODEL and TEXT are those of the board: 3 bits in
groups of 64, TEXT the folder that board/cut.py wrote. Without them the model is the random one of
`modelpress bench quantize`, 4 bits in groups of 128. Both get the same windows, and write
compressed-tensors; ours without sweeps and with them, and whole: with both checks and what it takes
to start. Theirs is timed from loading the model to the written result.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from compress.bench.quantize import write_synthetic_model
from compress.bench.settings import QuantizeBench

PEER = Path(__file__).parents[1] / "board/by_llmcompressor.py"
OURS = """
import json, sys
import torch
from compress.data.windows import CalibrationWindows
from compress.pipeline.run import run
recipe, output, windows = sys.argv[1:]
ids = torch.tensor(json.load(open(windows)))
data = CalibrationWindows(ids, torch.ones_like(ids).bool())
result = run(json.loads(recipe), output, windows=data)
print(json.dumps({"seconds": result.seconds, "peak": result.peak_memory["host"]}))
"""


def synthetic(folder: Path) -> tuple[Path, Path, int, int]:
    """The benchmark's model and windows of random tokens: MODEL, TEXT, bits and group size."""
    bench = QuantizeBench()
    model, text = folder / "model", folder / "text"
    write_synthetic_model(model, bench)
    words = {f"w{i}": i for i in range(bench.vocabulary)}  # llm-compressor asks for a tokenizer
    tokenizer = Tokenizer(WordLevel(words, "w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(model)
    text.mkdir()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(bench.vocabulary, (bench.samples, bench.length), generator=generator)
    (text / "windows.json").write_text(json.dumps(ids.tolist()))
    return model, text, 4, 128


def recipe(model: Path, text: Path, bits: int, group: int, sweeps: int) -> dict[str, Any]:
    windows = json.loads((text / "windows.json").read_text())
    return {
        "name": "beside",
        "model": str(model),
        "calibration": {"samples": len(windows), "length": len(windows[0])},
        "rotate": "none",
        "quantize": {
            "bits": bits,
            "group_size": group,
            "token_importance": "uniform",
            "refine_sweeps": sweeps,
        },
    }


def finished(command: list[str]) -> dict[str, Any]:
    """The last line of what a program prints, and the seconds from its start to its end."""
    started = time.perf_counter()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1]) | {"whole": time.perf_counter() - started}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("python", type=Path, help="that of llm-compressor's environment")
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("text", type=Path, nargs="?")
    parser.add_argument("--dtype", default="auto", help="in which llm-compressor computes")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if asked.model is None:
            model, text, bits, group = synthetic(folder)
        else:
            model, text, bits, group = asked.model.absolute(), asked.text.absolute(), 3, 64
        rows = {}
        for sweeps in (0, 5):
            made = json.dumps(recipe(model, text, bits, group, sweeps))
            output, windows = str(folder / f"ours-{sweeps}"), str(text / "windows.json")
            command = [sys.executable, "-c", OURS, made, output, windows]
            rows[f"ours, {sweeps} sweeps"] = finished(command)
        theirs = [str(model), str(text), str(folder), f"w{bits}", "--group", str(group)]
        command = [str(asked.python), str(PEER), *theirs, "--dtype", asked.dtype]
        rows[f"llm-compressor, {asked.dtype}"] = finished(command)
    for name, row in rows.items():
        inside = row["seconds"]
        seconds = inside if isinstance(inside, float) else sum(inside.values())
        peak = row.get("peak") or row["peak_memory"]
        print(f"{name:26} {seconds:7.1f} s, {row['whole']:7.1f} whole  {peak / 1e6:7.0f} MB")


if __name__ == "__main__":
    main()
