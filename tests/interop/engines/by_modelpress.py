"""Asks modelpress itself: what other engines' answers are compared with.

    python tests/interop/engines/by_modelpress.py OUT CHECKPOINT

`compress.load` in fp32, dense: weights by the layout of the format and no rounding besides. A GGUF
file is one of the same codes, so that its answer is that of the folder it was made from; where the
export rounds the embedding to 8 bits as well, that table is read from the file by the library gguf.
"""

import asking
import torch
import torch_model

import compress


def ask(asked: asking.Asked) -> asking.Answer:
    if files := [*asked.checkpoint.glob("*.gguf")]:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(
            asked.checkpoint, gguf_file=files[0].name, dtype=torch.float32
        ).eval()
    else:
        model, _ = compress.load(asked.checkpoint, dtype=torch.float32, packed=False)
    return torch_model.answer(asked, model)


if __name__ == "__main__":
    asking.main("modelpress", ["modelpress", "torch", "transformers"], ask)
