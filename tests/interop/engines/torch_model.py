"""The answer of an engine whose models are transformers' own classes."""

import asking
import numpy as np
import torch
from transformers import PreTrainedModel


@torch.no_grad()
def answer(asked: asking.Asked, model: PreTrainedModel) -> asking.Answer:
    """By the model's logits, and by `generate`."""

    def logits(ids: list[int]) -> np.ndarray:
        return model(input_ids=torch.tensor([ids])).logits[0].float().numpy()

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
