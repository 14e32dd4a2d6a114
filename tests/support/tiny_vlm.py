"""A very small, random model of the demo model's kind: scenes of 144 patches, words as tokens."""

from pathlib import Path

import torch

LAYERS = 3
SIZES = {"width": 32, "tower_layers": 2, "layers": LAYERS}


def write_vlm(folder: Path, word: str | None = None) -> Path:
    """A checkpoint with its processor. `word`: its head says that, then the end, on and on."""
    from compress.recipes.demo.vlm_model import build_model, build_processor

    torch.manual_seed(3)
    model, processor = build_model(**SIZES).eval(), build_processor()
    for parameter in model.parameters():
        if parameter.ndim == 2:  # the default 0.02 makes all attention uniform
            torch.nn.init.normal_(parameter, std=0.2)
    if word is not None:
        _say(model, processor.tokenizer, word)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _say(model, tokenizer, word: str) -> None:
    """The word's own embedding leads to the end, everything else to the word.

    Layers add nothing, so that the head sees embeddings alone.
    """
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embedding = model.model.language_model.embed_tokens.weight
        embedding[:, 0] = 1
        number = tokenizer.convert_tokens_to_ids(word)
        embedding[number] = torch.nn.functional.one_hot(torch.tensor(1), embedding.shape[1])
        head = model.lm_head.weight.zero_()
        head[number, 0] = 1
        head[tokenizer.eos_token_id, 1] = 1
