"""`modelpress bench quantize`: time and memory of a run on a synthetic checkpoint, and its floor.

The floor is what no implementation of the method can avoid, at the fp32 matmul rate that this
machine shows in the same call:

    one forward of the calibration tokens      2 N K tokens for each linear, 2 T^2 d for attention
    one symmetric Hessian for each input       K^2 tokens
    the solves                                 K^3 / 3 for each Cholesky, N K^2 for each column loop

and the bytes of one layer for memory. Refinement sweeps, rotation and token importance are extra
work that the floor does not count. The run is a process of its own, so that its peak memory is its
own; importing libraries and the reload in the self-check are not timed.

    bench_quantize(QuantizeBench(bits=4, group_size=128))
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compress.errors import CompressError

if TYPE_CHECKING:
    from compress.recipe.recipe import Recipe

MATMUL_SIZE = 2048
MATMUL_SECONDS = 1.5


@dataclass(frozen=True)
class QuantizeBench:
    """The synthetic model (a random Llama, bf16 on disk), the calibration and the method."""

    hidden: int = 1024
    mlp: int = 2816
    layers: int = 8
    heads: int = 16
    kv_heads: int = 8
    vocabulary: int = 512
    samples: int = 32
    length: int = 512
    bits: int = 4
    group_size: int | str = 128
    refine_sweeps: int = 5
    rotate: str = "none"
    token_importance: str = "uniform"
    offload: str = "disk"
    device: str = "cpu"

    def linears(self) -> list[tuple[int, int]]:
        """(out, in) of a decoder layer's linears, grouped by input: stacked outputs."""
        kv = self.hidden // self.heads * self.kv_heads
        return [
            (self.hidden + 2 * kv, self.hidden),
            (self.hidden, self.hidden),
            (2 * self.mlp, self.hidden),
            (self.hidden, self.mlp),
        ]

    def floor_operations(self) -> dict[str, float]:
        """Floating-point operations of the whole run, by part."""
        tokens = self.samples * self.length
        linears = self.linears()
        attention = 2 * self.length * self.hidden * tokens
        parts = {
            "forward": sum(2 * N * K * tokens for N, K in linears) + attention,
            "hessians": sum(K * K * tokens for _, K in linears),
            "solves": sum(K**3 / 3 + N * K * K for N, K in linears),
        }
        return {name: float(self.layers * value) for name, value in parts.items()}

    def recipe(self, model: Path) -> "Recipe":
        """The recipe of the run; RecipeError where a value is not one that recipes know."""
        from compress.recipe.recipe import Recipe

        calibration = {"samples": self.samples, "length": self.length, "offload": self.offload}
        quantize = {
            "bits": self.bits,
            "group_size": self.group_size,
            "refine_sweeps": self.refine_sweeps,
            "token_importance": self.token_importance,
        }
        return Recipe.from_dict(
            {
                "name": "bench",
                "model": str(model),
                "calibration": calibration,
                "rotate": self.rotate,
                "quantize": quantize,
            }
        )

    def layer_bytes(self) -> int:
        """One layer in fp32."""
        return sum(N * K for N, K in self.linears()) * 4


def matmul_rate(device: str = "cpu") -> float:
    """Floating-point operations a second of a square fp32 product, the best of many."""
    a = torch.randn(MATMUL_SIZE, MATMUL_SIZE, device=device)
    best, started = float("inf"), time.perf_counter()
    while time.perf_counter() - started < MATMUL_SECONDS:
        before = time.perf_counter()
        a @ a
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - before)
    return 2 * MATMUL_SIZE**3 / best


def write_synthetic_model(folder: Path, bench: QuantizeBench, seed: int = 0) -> None:
    """A random Llama of the given shape, bf16, with no tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=bench.hidden,
        intermediate_size=bench.mlp,
        num_hidden_layers=bench.layers,
        num_attention_heads=bench.heads,
        num_key_value_heads=bench.kv_heads,
        vocab_size=bench.vocabulary,
        max_position_embeddings=bench.length,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def bench_quantize(bench: QuantizeBench) -> dict[str, Any]:
    """Runs the benchmark; returns its figures and conditions (times in seconds, sizes in bytes)."""
    with tempfile.TemporaryDirectory(prefix="modelpress-bench-") as temporary:
        folder = Path(temporary)
        bench.recipe(folder / "model")  # a wrong value shows here, not in another process
        write_synthetic_model(folder / "model", bench)
        rate_before = matmul_rate(bench.device)
        measured = _run_child(folder, bench)
        rate_after = matmul_rate(bench.device)
    rate = max(rate_before, rate_after)
    operations = bench.floor_operations()
    floor = sum(operations.values()) / rate
    return {
        "conditions": asdict(bench) | {
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "matmul_rate": rate,
            "matmul_rates": [rate_before, rate_after],
        },
        "floor": {
            "seconds": floor,
            "parts": {name: value / rate for name, value in operations.items()},
            "layer_bytes": bench.layer_bytes(),
        },
        "seconds": measured["seconds"],
        "layers_seconds": measured["layers_seconds"],
        "ratio": measured["seconds"] / floor,
        "peak_memory": measured["peak_memory"],
        "mean_error": measured["mean_error"],
    }  # fmt: skip


def _run_child(folder: Path, bench: QuantizeBench) -> dict[str, Any]:
    job = json.dumps({"folder": str(folder), "bench": asdict(bench)})
    command = [sys.executable, "-m", "compress.bench.quantize", job]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    if child.returncode:
        last = (child.stderr.strip().splitlines() or [f"code {child.returncode}"])[-1]
        raise CompressError(f"the benchmark's run failed: {last}")
    return json.loads(child.stdout.splitlines()[-1])


def _child(folder: Path, bench: QuantizeBench) -> dict[str, Any]:
    """One run in this process: random tokens, nothing evaluated, no self-check."""
    import transformers.models.llama.modeling_llama  # noqa: F401  (imports are not timed)

    from compress.data.windows import CalibrationWindows
    from compress.pipeline.run import run

    recipe = bench.recipe(folder / "model")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(bench.vocabulary, (bench.samples, bench.length), generator=generator)
    windows = CalibrationWindows(ids, torch.ones_like(ids, dtype=torch.bool))
    started = time.perf_counter()
    result = run(recipe, folder / "out", windows=windows, self_check=False, device=bench.device)
    errors = [module["error"] for layer in result.layers for module in layer["modules"]]
    return {
        "seconds": time.perf_counter() - started,
        "layers_seconds": result.seconds["layers"],
        "peak_memory": result.peak_memory,
        "mean_error": sum(errors) / len(errors),
    }


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    print(json.dumps(_child(Path(job["folder"]), QuantizeBench(**job["bench"]))))
