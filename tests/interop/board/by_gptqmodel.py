"""GPTQ and GPTAQ of GPTQModel at 2, 3 and 4 bits in groups of 64: a row of the board each.

It takes an environment of its own that borrows the project's packages:

    python -m venv ENV
    echo "import site; site.addsitedir('PROJECT/lib/python3.X/site-packages')" \\
        > ENV/lib/python3.X/site-packages/project.pth
    ENV/bin/pip install --no-deps gptqmodel==7.7.0 optimum==2.3.0 pypcre tokenicer logbar \\
        device-smi defuser
    GPTQMODEL_CPU_WORKERS=2 ENV/bin/python tests/interop/board/by_gptqmodel.py MODEL TEXT OUT w3

TEXT is the folder that cut.py wrote; a case is w3 (GPTQ) or w3-gptaq. Its own groups are of 128, of
which 576 is no multiple. All else is its default: symmetric, activation order within groups,
GPTAQ's alpha of 0.25.
"""

import argparse
import contextlib

import peer
from gptqmodel import BACKEND, GPTAQConfig, GPTQModel, QuantizeConfig

GROUP = 64
CASES = {f"w{bits}{suffix}": (bits, suffix) for suffix in ("", "-gptaq") for bits in (2, 3, 4)}
PACKAGES = ("gptqmodel", "transformers", "torch")


def make(asked: argparse.Namespace) -> None:
    bits, suffix = CASES[asked.case]
    method = "GPTAQ" if suffix else "GPTQ"
    options = {"bits": bits, "group_size": GROUP} | ({"gptaq": GPTAQConfig()} if suffix else {})
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in peer.windows(asked)]
    name = f"gptqmodel-{method.lower()}-w{bits}"
    settings = {"method": method, "group_size": GROUP}
    asked.out.mkdir(parents=True, exist_ok=True)
    source = asked.model.absolute()
    with peer.making(asked, name, bits, settings, PACKAGES) as folder:
        target = folder.absolute()
        with contextlib.chdir(asked.out):  # where it leaves its logs
            model = GPTQModel.load(str(source), QuantizeConfig(**options), device="cpu")
            model.quantize(rows, batch_size=1, backend=BACKEND.GPTQ_TORCH)
            model.save(str(target))


if __name__ == "__main__":
    make(peer.arguments(__doc__, list(CASES)))
