"""auto-round at 2, 3 and 4 bits in groups of 64: a row of the board each.

It takes an environment of its own that borrows the project's packages:

    python -m venv ENV
    echo "import site; site.addsitedir('PROJECT/lib/python3.X/site-packages')" \\
        > ENV/lib/python3.X/site-packages/project.pth
    ENV/bin/pip install --no-deps auto-round==0.16.1 py-cpuinfo
    ENV/bin/python tests/interop/board/by_autoround.py MODEL TEXT OUT w3-light

TEXT is the folder that cut.py wrote; a case is w3 (its default: 200 steps a layer) or w3-light (its
setting of that name: 50 steps, 0.005 a step). The schemes are its own W2A16, W3A16 and W4A16
(symmetric integers), their groups of 128 made 64: 576 is no multiple of 128. All else is its
default; the format is auto_gptq. It takes hours of one thread.
"""

import argparse

import peer
import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer

GROUP = 64
BATCH = 8  # windows a step, its default
SETTINGS = {"": {"iters": 200}, "-light": {"iters": 50, "lr": 5e-3}}
CASES = {f"w{bits}{suffix}": (bits, suffix) for suffix in SETTINGS for bits in (2, 3, 4)}
PACKAGES = ("auto-round", "transformers", "torch")


def make(asked: argparse.Namespace) -> None:
    bits, suffix = CASES[asked.case]
    rows = torch.tensor(peer.windows(asked))  # [N, T]
    settings = {"scheme": f"W{bits}A16", "group_size": GROUP} | SETTINGS[suffix]
    with peer.making(asked, f"autoround-{asked.case}", bits, settings, PACKAGES) as folder:
        rounding = AutoRound(
            AutoModelForCausalLM.from_pretrained(asked.model, dtype="auto"),
            tokenizer=AutoTokenizer.from_pretrained(asked.model),
            dataset=[{"input_ids": part} for part in rows.split(BATCH)],
            nsamples=len(rows),
            seqlen=rows.shape[1],
            batch_size=BATCH,
            device_map="cpu",
            **settings,
        )
        rounding.quantize_and_save(str(folder), format="auto_gptq")
        (inside,) = folder.iterdir()  # it makes a folder in the one that it is given
        for file in inside.iterdir():
            file.rename(folder / file.name)
        inside.rmdir()


if __name__ == "__main__":
    make(peer.arguments(__doc__, list(CASES)))
