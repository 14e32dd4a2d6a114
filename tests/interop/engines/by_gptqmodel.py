"""Asks GPTQModel, with its plain torch kernel, on a CPU.

    GPTQMODEL_CPU_WORKERS=2 ENV/bin/python tests/interop/engines/by_gptqmodel.py OUT CHECKPOINT

ENV is made as the head of check_gptqmodel.py says. GPTQModel needs two workers there even for one
processor; its kernel is compiled anew for every module, so that this is turned off.
"""

import os

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import asking
import numpy as np
import torch


def ask(asked: asking.Asked) -> asking.Answer:
    from gptqmodel import BACKEND, GPTQModel

    loaded = GPTQModel.load(
        str(asked.checkpoint), device="cpu", dtype=torch.float16, backend=BACKEND.GPTQ_TORCH
    )
    model = loaded.model.float().eval()

    @torch.no_grad()
    def logits(ids: list[int]) -> np.ndarray:
        return model(input_ids=torch.tensor([ids])).logits[0].float().numpy()

    @torch.no_grad()
    def generate(ids: list[int]) -> list[int]:
        tokens = model.generate(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            do_sample=False,
            max_new_tokens=asking.NEW_TOKENS,
            min_new_tokens=asking.NEW_TOKENS,
            pad_token_id=0,
        )
        return tokens[0, len(ids) :].tolist()

    return asking.by_logits(asked, logits, generate)


if __name__ == "__main__":
    asking.main("gptqmodel", ["gptqmodel", "torch", "transformers"], ask)
