"""Makes the small checkpoints in tests/interop/foreign, with the programs that others use.

Not part of the tests: what it made is. Both programs ask for other versions than this project and
take an environment of their own that borrows its packages:

    python -m venv ENV
    echo "import site; site.addsitedir('PROJECT/lib/python3.X/site-packages')" \\
        > ENV/lib/python3.X/site-packages/project.pth
    ENV/bin/pip install --no-deps gptqmodel==7.7.0 optimum==2.3.0 pypcre tokenicer logbar \\
        device-smi defuser
    GPTQMODEL_CPU_WORKERS=2 ENV/bin/python tests/interop/make_foreign.py gptqmodel

    ENV2/bin/pip install --no-deps llmcompressor==0.14.0.1 loguru
    ENV2/bin/python tests/interop/make_foreign.py llmcompressor      # and names of cases, or all

    ENV3/bin/pip install --no-deps llmcompressor==0.13.0 compressed-tensors==0.18.0 loguru
    ENV3/bin/python tests/interop/make_foreign.py llmcompressor-act-order   # later ones have none

Each case quantises a random Llama of two layers and writes the checkpoint, and beside it
expected.safetensors: some token ids, and the logits in fp32 that the program itself gives for them.
"""

import contextlib
import json
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parents[2]
FOREIGN = ROOT / "tests" / "interop" / "foreign"
sys.path.insert(0, str(ROOT / "tests"))

from support.tiny_checkpoints import byte_tokenizer, random_ids, tiny_model  # noqa: E402

KEPT = ("config.json", "*.safetensors", "tokenizer*.json")
TOO_LARGE = 300_000  # bytes

# Keyword arguments of gptqmodel.QuantizeConfig.
GPTQ = {
    "gptqmodel-w4": {"bits": 4, "group_size": 32, "desc_act": False},
    "gptqmodel-w4-act-order": {"bits": 4, "group_size": 32, "desc_act": True},
    "gptqmodel-w3-asymmetric": {"bits": 3, "group_size": 64, "desc_act": False, "sym": False},
    "gptqmodel-mixed": {
        "bits": 4,
        "group_size": 64,
        "desc_act": False,
        "act_group_aware": False,  # it takes no -1
        "dynamic": {
            r"+:.*down_proj": {"bits": 8, "group_size": -1},
            r"+:.*layers\.1\.mlp\.(gate|up)_proj": {"bits": 2, "group_size": 32},
            r"-:.*layers\.0\.self_attn\.o_proj": {},
        },
    },
}
# Scheme of each group of modules: bits, group size, symmetric, bits of activations.
COMPRESSED_TENSORS = {
    "llmcompressor-w4": {"Linear": (4, 32, True, None)},
    "llmcompressor-w8a8": {"Linear": (8, None, True, 8)},
    "llmcompressor-mixed": {
        "re:.*self_attn.*": (8, None, True, None),
        r"re:.*layers\.0\.mlp\.(gate|up)_proj": (3, 32, False, None),
        r"re:.*layers\.1\.mlp\.(gate|up)_proj": (5, 64, True, None),
        "re:.*down_proj": (4, 64, False, None),
    },
}
ACT_ORDER = {"llmcompressor-w4-act-order": {"Linear": (4, 32, True, None)}}


def calibration() -> list[dict[str, torch.Tensor]]:
    ids = random_ids(32, 48, seed=1)
    return [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in ids]


def probe() -> torch.Tensor:
    return random_ids(2, 24, seed=2)


def by_gptqmodel(settings: dict, source: Path, target: Path) -> torch.Tensor:
    """Quantises, saves, reloads with the plain torch kernel; its logits in fp32."""
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    model = GPTQModel.load(str(source), QuantizeConfig(**settings), device="cpu")
    model.quantize(calibration(), batch_size=1, backend=BACKEND.GPTQ_TORCH)
    model.save(str(target))
    loaded = GPTQModel.load(
        str(target), device="cpu", dtype=torch.float16, backend=BACKEND.GPTQ_TORCH
    )
    with torch.no_grad():
        return loaded.model.float().eval()(input_ids=probe()).logits


def by_llmcompressor(groups: dict, source: Path, target: Path, **options: str) -> torch.Tensor:
    """Quantises with its GPTQ, given options, saves; the logits of the model in memory, in fp32."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModelForCausalLM

    def by_token(bits: int | None) -> QuantizationArgs | None:
        return bits and QuantizationArgs(num_bits=bits, strategy="token", dynamic=True)

    schemes = {
        f"group_{i}": QuantizationScheme(
            targets=[target_],
            weights=QuantizationArgs(
                num_bits=bits,
                group_size=size,
                symmetric=symmetric,
                strategy="group" if size else "channel",
            ),
            input_activations=by_token(activations),
        )
        for i, (target_, (bits, size, symmetric, activations)) in enumerate(groups.items())
    }
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    rows = [{key: tensor[0].tolist() for key, tensor in row.items()} for row in calibration()]
    oneshot(
        model=model,
        tokenizer=byte_tokenizer(),
        dataset=Dataset.from_list(rows),
        recipe=GPTQModifier(config_groups=schemes, ignore=["lm_head"], **options),
        max_seq_length=48,
        num_calibration_samples=len(rows),
    )
    with torch.no_grad():
        logits = model.eval()(input_ids=probe()).logits
    model.save_pretrained(target, save_compressed=True)
    return logits


def forget_paths(path: Path) -> None:
    """Takes out where on this machine the program kept its own temporary files."""
    config = json.loads(path.read_text())
    config["quantization_config"].get("meta", {}).pop("offload_to_disk_path", None)
    path.write_text(json.dumps(config, indent=2) + "\n")


def make(name: str, program, settings: dict) -> int:
    """Writes foreign/NAME; its bytes."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        source, target = Path(folder) / "model", Path(folder) / "quantised"
        stack.enter_context(contextlib.chdir(folder))  # where GPTQModel leaves its logs
        tiny_model("llama", tied=False).to(torch.float16).save_pretrained(source)
        byte_tokenizer().save_pretrained(source)
        logits = program(settings, source, target)
        byte_tokenizer().save_pretrained(target)
        final = FOREIGN / name
        shutil.rmtree(final, ignore_errors=True)
        final.mkdir(parents=True)
        for pattern in KEPT:
            for file in target.glob(pattern):
                shutil.copyfile(file, final / file.name)
        forget_paths(final / "config.json")
        expected = {"input_ids": probe(), "logits": logits.float().contiguous()}
        save_file(expected, final / "expected.safetensors")
    return sum(file.stat().st_size for file in final.iterdir())


def main() -> int:
    programs = {
        "gptqmodel": (by_gptqmodel, GPTQ),
        "llmcompressor": (by_llmcompressor, COMPRESSED_TENSORS),
        "llmcompressor-act-order": (partial(by_llmcompressor, actorder="group"), ACT_ORDER),
    }
    if sys.argv[1:2] not in [[name] for name in programs]:
        print(f"expected one of {', '.join(programs)}", file=sys.stderr)
        return 2
    program, cases = programs[sys.argv[1]]
    too_large = False
    for name in sys.argv[2:] or cases:
        settings = cases[name]
        size = make(name, program, settings)
        section = json.loads((FOREIGN / name / "config.json").read_text())["quantization_config"]
        written = section.get("checkpoint_format") or section.get("format")
        print(f"{name:26} {size:7,} bytes   {section['quant_method']} {written}", flush=True)
        too_large |= size > TOO_LARGE
    return int(too_large)


if __name__ == "__main__":
    sys.exit(main())
