"""Asks plain transformers, in fp32, as the card of a checkpoint says that it is loaded.

    python tests/interop/engines/by_transformers.py OUT CHECKPOINT

Checkpoints in compressed-tensors are asked in the project's environment, GPTQ exports in that of
check_gptqmodel.py, which has `optimum` and `gptqmodel`. An asymmetric checkpoint is loaded with
`dequantize=True`.
"""

import json

import asking
import torch
import torch_model
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
    return torch_model.answer(asked, model)


if __name__ == "__main__":
    asking.main("transformers", ["transformers", "compressed-tensors", "torch"], ask)
