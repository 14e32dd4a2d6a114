"""Asks GPTQModel, with its plain torch kernel, on a CPU.

    GPTQMODEL_CPU_WORKERS=2 ENV/bin/python tests/interop/engines/by_gptqmodel.py OUT CHECKPOINT

ENV is made as the head of check_gptqmodel.py says. GPTQModel needs two workers there even for one
processor; its kernel is compiled anew for every module, so that this is turned off.
"""

import os

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import asking
import torch
import torch_model


def ask(asked: asking.Asked) -> asking.Answer:
    from gptqmodel import BACKEND, GPTQModel

    loaded = GPTQModel.load(
        str(asked.checkpoint), device="cpu", dtype=torch.float16, backend=BACKEND.GPTQ_TORCH
    )
    model = loaded.model.float().eval()
    return torch_model.answer(asked, model)


if __name__ == "__main__":
    asking.main("gptqmodel", ["gptqmodel", "torch", "transformers"], ask)
