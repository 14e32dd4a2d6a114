"""GPTQ of llm-compressor at 2, 3 and 4 bits in groups of 64: a row of the board each.

It pins older versions than this project's and takes an environment of its own, which may borrow
the project's other packages:

    python -m venv ENV
    echo "import site; site.addsitedir('PROJECT/lib/python3.X/site-packages')" \\
        > ENV/lib/python3.X/site-packages/project.pth
    ENV/bin/pip install --no-deps llmcompressor==0.14.0.1 loguru
    ENV/bin/pip install compressed-tensors==0.19.0 transformers==5.17.0 auto-round==0.15.1
    ENV/bin/python tests/interop/board/by_llmcompressor.py MODEL TEXT OUT w3

TEXT is the folder that cut.py wrote. The schemes are its own W2A16, W3A16 and W4A16 (symmetric
integers), their groups of 128 made 64: 576 is no multiple of 128. The head is left out, as in its
examples. All else is its default: the order of the columns by activation, damping 0.01.
`--group` and `--dtype` are for other models than the board's (scale/beside_llmcompressor.py).
"""

import argparse

import peer
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

CASES = {f"w{bits}": bits for bits in (2, 3, 4)}
OPTIONS = {
    "--group": {"type": int, "default": 64},
    "--dtype": {"default": "auto", "help": "to compute in: float32, bfloat16; the model's own"},
}
PACKAGES = ("llmcompressor", "compressed-tensors", "transformers", "torch")


def scheme(bits: int, group: int) -> QuantizationScheme:
    """Its preset with other groups."""
    found = preset_name_to_scheme(f"W{bits}A16", ["Linear"])
    found.weights.group_size = group
    return found


def make(asked: argparse.Namespace) -> None:
    bits, rows = CASES[asked.case], peer.windows(asked)
    settings = {"method": "GPTQ", "scheme": f"W{bits}A16", "group_size": asked.group}
    if asked.dtype != "auto":
        settings["dtype"] = asked.dtype
    groups = {"group_0": scheme(bits, asked.group)}
    modifier = GPTQModifier(config_groups=groups, ignore=["lm_head"])
    with peer.making(asked, f"llmcompressor-gptq-w{bits}", bits, settings, PACKAGES) as folder:
        model = AutoModelForCausalLM.from_pretrained(asked.model, dtype=asked.dtype)
        tokenizer = AutoTokenizer.from_pretrained(asked.model)
        mask = [1] * len(rows[0])
        oneshot(
            model=model,
            tokenizer=tokenizer,
            dataset=Dataset.from_list([{"input_ids": r, "attention_mask": mask} for r in rows]),
            recipe=modifier,
            max_seq_length=len(rows[0]),
            num_calibration_samples=len(rows),
        )
        model.save_pretrained(folder, save_compressed=True)
        tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    make(peer.arguments(__doc__, list(CASES), options=OPTIONS))
