"""Small random models of each family, and the rotation of a whole one held in memory.

model = tiny_model("qwen2", hidden=56, heads=14, kv_heads=2, head_dim=64, mlp=76)
rotated = rotate_model(model, kind="hadamard", seed=0)      # a new, untied model
"""

import copy

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from compress.models.families import architecture_of, head_dim_of
from compress.rotation.rotate import (
    fuse_and_rotate_head,
    fuse_norms_into_layer,
    head_rotation,
    make_rotation,
    rotate_embedding,
    rotate_layer,
)

VOCABULARY = 61


def tiny_model(
    family: str,
    hidden: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    mlp: int,
    layers: int = 2,
    seed: int = 0,
    **config,
) -> nn.Module:
    """A model in fp64 whose every parameter is random: norm weights far from 1, biases from 0.

    The embeddings have a mean, so that removing it would show in the logits.
    """
    settings = AutoConfig.for_model(
        family,
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        max_position_embeddings=64,
        **config,
    )
    model = AutoModelForCausalLM.from_config(settings).double().eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if "embed_tokens" in name:
            noise += 0.5
        elif name.endswith("norm.weight"):
            noise = 0.5 + noise.abs()
        elif parameter.dim() == 2:
            noise /= parameter.shape[1] ** 0.5
        parameter.data.copy_(noise)
    return model


def rotate_model(
    model: nn.Module,
    kind: str = "hadamard",
    seed: int = 0,
    fuse: bool = True,
    rotate_residual: bool = True,
    rotate_heads: bool = True,
) -> nn.Module:
    """A new model with untied embeddings whose logits should equal the old one's."""
    spec, head_dim = architecture_of(model.config), head_dim_of(model.config)
    residual = make_rotation(kind, model.config.hidden_size, seed) if rotate_residual else None
    heads = head_rotation(kind, head_dim, seed) if rotate_heads else None
    old = model.state_dict()
    new = dict(old)

    for i in range(model.config.num_hidden_layers):
        prefix = f"{spec.layers}.{i}."
        layer = {n.removeprefix(prefix): t for n, t in old.items() if n.startswith(prefix)}
        if fuse:
            layer = fuse_norms_into_layer(layer, spec.layer(i))
        layer = rotate_layer(layer, spec.layer(i), residual, heads, head_dim)
        new |= {prefix + n: t for n, t in layer.items()}

    norm, head, embedding = (f"{n}.weight" for n in (spec.final_norm, spec.head, spec.embedding))
    gamma = old[norm] if fuse else torch.ones_like(old[norm])
    new[head] = fuse_and_rotate_head(old[head], gamma, residual)
    new[embedding] = rotate_embedding(old[embedding], residual)
    if fuse:
        new[norm] = torch.ones_like(old[norm])

    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = False
    rotated = AutoModelForCausalLM.from_config(config).double().eval()
    rotated.load_state_dict(new, strict=True)
    return rotated


@torch.no_grad()
def logits(model: nn.Module, seed: int = 0) -> Tensor:
    """Logits on two random sequences of 9 tokens: [2, 9, VOCABULARY], in the model's dtype."""
    tokens = torch.randint(0, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(seed))
    return model(tokens).logits


def relative_error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|, Frobenius, in fp64."""
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm())
