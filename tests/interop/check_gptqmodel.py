"""Whether GPTQModel and transformers read an exported GPTQ checkpoint as what was written.

Not part of the tests: GPTQModel asks for newer versions than this project and compiles extensions.
It takes an environment of its own that borrows the project's packages:

    python -m venv ENV
    echo "import site; site.addsitedir('PROJECT/lib/python3.X/site-packages')" \\
        > ENV/lib/python3.X/site-packages/project.pth
    ENV/bin/pip install --no-deps gptqmodel==7.7.0 optimum==2.3.0 pypcre tokenicer logbar \\
        device-smi defuser
    ENV/bin/python tests/interop/check_gptqmodel.py

Each case quantises the demo model (or a tiny Qwen with biases), exports it, and loads it on the CPU
with the plain torch kernel. The oracle reads the source checkpoint by its documented layout.

    weights   of GPTQModel, dequantised in fp32: must be equal bit for bit, and of the same modules
    logits    of GPTQModel in fp32: relative error at most 1e-5
    transformers   relative error of its logits at most 2e-3: it rounds dequantised weights to fp16;
              where the export says that transformers will not load it, it is not tried
"""

import contextlib
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPTQConfig

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from compress.checkpoint.export import export  # noqa: E402
from compress.pipeline.run import run  # noqa: E402
from compress.recipe.recipe import Recipe  # noqa: E402
from support.tiny_checkpoints import (  # noqa: E402
    dequantised,
    random_ids,
    read_tensors,
    relative_error,
    widths_of,
    write_checkpoint,
)

DEMO = ROOT / "recipes" / "demo" / "lm"
DOWN8 = {"match": r"re:.*down_proj$", "bits": 8}
GATE2 = {"match": r"re:.*layers\.[03]\.mlp\.(gate|up)_proj$", "bits": 2, "group_size": 64}
ATTENTION3 = {"match": r"re:.*layers\.[12]\.self_attn.*", "bits": 3}
CASES = {
    "2 bits": {"bits": 2},
    "3 bits": {"bits": 3, "group_size": 64},
    "4 bits": {},
    "8 bits, channel": {"bits": 8, "group_size": "channel"},
    "3 bits, asymmetric": {"bits": 3, "symmetric": False},
    "4 bits, asymmetric": {"symmetric": False},
    "2, 3, 4, 8 bits": {"overrides": [DOWN8, GATE2, ATTENTION3]},
    "2, 3, 4, 8 bits, some asymmetric": {
        "overrides": [DOWN8, GATE2, ATTENTION3 | {"symmetric": False}]
    },
    "head of 8 bits": {"ignore": [], "overrides": [{"match": "lm_head", "bits": 8}]},
    "no down_proj": {"ignore": ["lm_head", "re:.*down_proj"]},
    "no down_proj in layer 0": {"ignore": ["lm_head", r"re:.*layers\.0\.mlp\.down_proj"]},
    "qwen2 with biases": {"overrides": [DOWN8]},
}
LOGITS, HALF_WEIGHTS = 1e-5, 2e-3


def make(quantize: dict, model: Path, folder: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Writes folder/source and folder/gptq; the oracle's weights, and the quantised modules."""
    recipe = Recipe.from_dict(
        {"model": str(model), "quantize": {"method": "rtn", "group_size": 32} | quantize}
    )
    run(recipe, folder / "source", self_check=False)
    bits = widths_of(recipe, model)
    return dequantised(read_tensors(folder / "source"), bits), list(bits)


def reference(model: Path, weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    config = AutoConfig.from_pretrained(model)
    config.tie_word_embeddings = "lm_head.weight" not in weights
    dense = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    missing, unexpected = dense.load_state_dict(weights, strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= {"lm_head.weight"}, missing
    return dense


def by_gptqmodel(folder: Path) -> torch.nn.Module:
    from gptqmodel import BACKEND, GPTQModel

    model = GPTQModel.load(
        str(folder), device="cpu", dtype=torch.float16, backend=BACKEND.GPTQ_TORCH
    )
    return model.model.float().eval()


def by_transformers(folder: Path, bits: int) -> torch.nn.Module:
    model, loading = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        output_loading_info=True,
        quantization_config=GPTQConfig(bits=bits, backend="gptq_torch"),
    )
    assert not any(loading.values()), loading
    return model.eval()


@torch.no_grad()
def check(name: str, quantize: dict, folder: Path) -> tuple[str, bool]:
    """One row of the table, and whether all of it is as it should be."""
    model = DEMO
    if "qwen2" in name:
        model = write_checkpoint(folder / "model", "qwen2", dtype=torch.bfloat16)
    weights, quantised = make(quantize, model, folder)
    exported = export(folder / "source", "gptq", folder / "gptq")
    dense = reference(model, weights)
    ids = random_ids(2, 48)
    expected = dense(input_ids=ids).logits

    found = by_gptqmodel(folder / "gptq")
    modules = {n: m for n, m in found.named_modules() if hasattr(m, "qweight")}
    equal = modules.keys() == set(quantised) and all(
        torch.equal(type(m).dequantize_weight(m).T, weights[f"{n}.weight"])
        for n, m in modules.items()
    )
    error = relative_error(found(input_ids=ids).logits, expected)
    fine, theirs = equal and error <= LOGITS, "not tried"
    if not any("transformers" in note for note in exported.notes):
        other = by_transformers(folder / "gptq", quantize.get("bits", 4))
        difference = relative_error(other(input_ids=ids).logits, expected)
        fine, theirs = fine and difference <= HALF_WEIGHTS, f"{difference:.1e}"
    row = f"{name:34} {len(modules):3} modules   weights {'equal' if equal else 'DIFFER'}   "
    return row + f"logits {error:.1e}   transformers {theirs}", fine


def main() -> int:
    rows = []
    for name, quantize in CASES.items():
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            rows.append(check(name, quantize, Path(folder)))
        print(rows[-1][0], flush=True)
    failed = [row for row, fine in rows if not fine]
    print(f"{len(rows) - len(failed)} of {len(rows)} as they should be")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
