"""Asks plain transformers, in fp32, as the card of a checkpoint says that it is loaded.

    python tests/interop/engines/by_transformers.py OUT CHECKPOINT

Checkpoints in compressed-tensors are asked in the project's environment, GPTQ exports in that of
check_gptqmodel.py, which has `optimum` and `gptqmodel`. An asymmetric checkpoint is loaded with
`dequantize=True`.
"""

import json

import asking
import numpy as np
import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, GPTQConfig


def options(config: dict) -> dict:
    """What `from_pretrained` is told beside the folder."""
    section = config.get("quantization_config", {})
    if section.get("quant_method") == "gptq":
        return {"quantization_config": GPTQConfig(bits=section["bits"], backend="gptq_torch")}
    groups = section.get("config_groups", {}).values()
    if all(group["weights"].get("symmetric", True) for group in groups):
        return {}
    return {"quantization_config": CompressedTensorsConfig(dequantize=True)}


def ask(asked: asking.Asked) -> asking.Answer:
    config = json.loads((asked.checkpoint / "config.json").read_text())
    model, loading = AutoModelForCausalLM.from_pretrained(
        asked.checkpoint, dtype=torch.float32, output_loading_info=True, **options(config)
    )
    if wrong := {kind: names for kind, names in loading.items() if names}:
        raise RuntimeError(f"loaded with {wrong}"[:400])
    model.eval()

    @torch.no_grad()
    def logits(ids: list[int]) -> np.ndarray:
        return model(input_ids=torch.tensor([ids])).logits[0].float().numpy()

    @torch.no_grad()
    def generate(ids: list[int]) -> list[int]:
        tokens = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            do_sample=False,
            max_new_tokens=asking.NEW_TOKENS,
            min_new_tokens=asking.NEW_TOKENS,
            pad_token_id=0,
        )
        return tokens[0, len(ids) :].tolist()

    return asking.by_logits(asked, logits, generate)


if __name__ == "__main__":
    asking.main("transformers", ["transformers", "compressed-tensors", "torch"], ask)
