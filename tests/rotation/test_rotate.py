"""Fusion and rotation change the weights and not the model: logits of whole tiny models."""

import pytest
import torch

from compress.errors import CheckpointError, CompressError, UsageError
from compress.models.family_specs import LayerSpec
from compress.rotation import rotate
from compress.rotation.rotate import (
    HadamardRotation,
    RandomRotation,
    fuse_and_rotate_head,
    fuse_and_rotate_layer,
    fuse_norms_into_layer,
    head_rotation,
    head_rotation_skipped,
    make_rotation,
    rotate_embedding,
    rotate_layer,
)
from support.refusals import check_line, refused
from support.whole_model import logits, relative_error, rotate_model, tiny_model

SPEC = LayerSpec()

# Head tables of Qwen2.5-1.5B (12 x 128), Llama-3.2-3B (24 x 128), Qwen2.5-0.5B (14 x 64) and
# others, on a residual stream and an MLP small enough to run in milliseconds.
MODELS = {
    "llama": {"family": "llama", "hidden": 64, "heads": 4, "kv_heads": 4, "head_dim": 16},
    "llama-24x128": {"family": "llama", "hidden": 48, "heads": 24, "kv_heads": 8, "head_dim": 128},
    "llama-biases": {
        **{"family": "llama", "hidden": 40, "heads": 4, "kv_heads": 1, "head_dim": 10},
        **{"attention_bias": True, "mlp_bias": True},
    },
    "llama-tied": {
        **{"family": "llama", "hidden": 36, "heads": 2, "kv_heads": 1, "head_dim": 8},
        "tie_word_embeddings": True,
    },
    "llama-blocks": {"family": "llama", "hidden": 50, "heads": 2, "kv_heads": 2, "head_dim": 6},
    "mistral": {"family": "mistral", "hidden": 40, "heads": 4, "kv_heads": 2, "head_dim": 16},
    "qwen2-12x128": {"family": "qwen2", "hidden": 48, "heads": 12, "kv_heads": 2, "head_dim": 128},
    "qwen2-14x64": {
        **{"family": "qwen2", "hidden": 56, "heads": 14, "kv_heads": 2, "head_dim": 64},
        "tie_word_embeddings": True,
    },
    "qwen3": {"family": "qwen3", "hidden": 24, "heads": 8, "kv_heads": 2, "head_dim": 32},
}


def build(name: str, **changes):
    return tiny_model(**{"mlp": 44, **MODELS[name], **changes})


def set_norms_to_one(model) -> None:
    """Layer and final norms only: q/k norms sit behind the projections and keep their weights."""
    for name, parameter in model.named_parameters():
        if name.endswith(("layernorm.weight", "model.norm.weight")):
            parameter.data.fill_(1.0)


def random_layer(hidden=16, heads=4, kv_heads=2, head_dim=6, mlp=20) -> dict[str, torch.Tensor]:
    shapes = {
        "self_attn.q_proj.weight": (heads * head_dim, hidden),
        "self_attn.k_proj.weight": (kv_heads * head_dim, hidden),
        "self_attn.v_proj.weight": (kv_heads * head_dim, hidden),
        "self_attn.q_proj.bias": (heads * head_dim,),
        "self_attn.v_proj.bias": (kv_heads * head_dim,),
        "self_attn.o_proj.weight": (hidden, heads * head_dim),
        "self_attn.o_proj.bias": (hidden,),
        "mlp.gate_proj.weight": (mlp, hidden),
        "mlp.up_proj.weight": (mlp, hidden),
        "mlp.down_proj.weight": (hidden, mlp),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


# ---- whole models: logits are preserved -----------------------------------------------------


@pytest.mark.parametrize("kind", ["hadamard", "random"])
@pytest.mark.parametrize("name", MODELS)
def test_rotated_model_has_the_same_logits(name, kind):
    model = build(name)
    rotated = rotate_model(model, kind)
    expected = logits(model)
    # transformers computes RMSNorm and RoPE in fp32 whatever the model's dtype.
    assert relative_error(logits(rotated), expected) < 1e-6
    assert relative_error(logits(rotated.float()), expected) < 1e-5
    assert type(rotated) is type(model)  # a plain model: nothing is left to do at run time
    for name in ("model.embed_tokens.weight", "model.layers.1.self_attn.o_proj.weight"):
        before, after = model.state_dict()[name], rotated.state_dict()[name].double()
        assert relative_error(after, before) > 0.1


@pytest.mark.parametrize("mlp", [4864, 5632, 9728])
def test_mlp_widths_of_real_models(mlp):
    model = build("llama", mlp=mlp, hidden=8, heads=1, kv_heads=1, head_dim=8, layers=1)
    assert relative_error(logits(rotate_model(model)), logits(model)) < 1e-6


@pytest.mark.parametrize("name", MODELS)
def test_fusion_alone_preserves_logits(name):
    model = build(name)
    fused = rotate_model(model, rotate_residual=False, rotate_heads=False)
    assert relative_error(logits(fused), logits(model)) < 1e-6
    assert bool((fused.model.layers[0].input_layernorm.weight == 1).all())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("part", ["residual", "heads", "both"])
def test_rotation_alone_preserves_logits(name, part):
    model = build(name)
    set_norms_to_one(model)
    rotated = rotate_model(
        model, fuse=False, rotate_residual=part != "heads", rotate_heads=part != "residual"
    )
    assert relative_error(logits(rotated), logits(model)) < 1e-6


def test_seed_decides_the_rotation_and_never_the_logits():
    model = build("qwen2-14x64")
    first, again, other = (rotate_model(model, seed=seed) for seed in (3, 3, 4))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert relative_error(logits(other), logits(first)) < 1e-6


@pytest.mark.parametrize("kind", ["hadamard", "random"])
def test_bf16_loses_no_more_than_the_unrotated_model(kind):
    """Mean over seeds of the error that a cast to bf16 makes in the logits."""
    plain, turned = [], []
    for seed in range(4):
        model = build("qwen3", seed=seed, hidden=64)
        expected = logits(model)
        rotated = rotate_model(model, kind, seed)
        plain.append(relative_error(logits(model.bfloat16()), expected))
        turned.append(relative_error(logits(rotated.bfloat16()), expected))
    assert sum(turned) / len(turned) < 0.05
    assert sum(turned) < 1.5 * sum(plain)


# ---- the rotation objects -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hadamard", "random"])
@pytest.mark.parametrize("size", [2, 12, 50, 96])
def test_rotation_is_orthogonal_and_its_products_are_its_matrix(kind, size):
    rotation = make_rotation(kind, size, seed=7)
    Q = rotation.matrix()
    assert Q.shape == (size, size) and Q.dtype == torch.float64
    assert torch.allclose(Q.T @ Q, torch.eye(size, dtype=Q.dtype), rtol=0, atol=1e-10)

    generator = torch.Generator().manual_seed(0)
    W = torch.randn(size, 5, size, generator=generator)  # fp32 in, fp64 out
    before = W.clone()
    assert torch.allclose(rotation.right(W), W.double() @ Q, rtol=0, atol=1e-12)
    expected = torch.einsum("ab,acd->bcd", Q, W.double())
    assert torch.allclose(rotation.left_transposed(W), expected, rtol=0, atol=1e-12)
    bias = W[:, 0, 0]
    assert torch.allclose(rotation.left_transposed(bias), Q.T @ bias.double(), rtol=0, atol=1e-12)
    assert rotation.right(W).dtype == torch.float64 and torch.equal(W, before)


@pytest.mark.parametrize("kind", ["hadamard", "random"])
def test_rotation_depends_on_its_seed_and_not_on_the_global_one(kind):
    torch.manual_seed(0)
    first = make_rotation(kind, 24, seed=5).matrix()
    state = torch.get_rng_state()
    again = make_rotation(kind, 24, seed=5).matrix()
    assert torch.equal(first, again) and torch.equal(state, torch.get_rng_state())
    assert not torch.equal(first, make_rotation(kind, 24, seed=6).matrix())


def test_random_rotation_is_sign_fixed():
    """QR of the same Gaussian has a triangular factor with a positive diagonal."""
    gaussian = torch.randn(9, 9, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    R = RandomRotation(9, seed=2).matrix().T @ gaussian
    assert torch.allclose(R.tril(-1), torch.zeros_like(R), atol=1e-12)
    assert bool((R.diagonal() > 0).all())


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", ["hadamard", "random"])
def test_rotation_flattens_planted_outliers(kind, side):
    W = torch.randn(96, 96, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    W[:, [3, 40]] *= 40.0
    rotation = make_rotation(kind, 96, seed=0)
    turned = rotation.right(W) if side == "right" else rotation.left_transposed(W.T)

    def kurtosis(x):  # 3 for a Gaussian
        return float((x - x.mean()).pow(4).mean() / x.var(correction=0) ** 2)

    def peak(x):
        return float(x.abs().max() / x.pow(2).mean().sqrt())

    assert kurtosis(turned) < 0.1 * kurtosis(W)
    assert peak(turned) < 0.6 * peak(W)


def test_no_rotation_and_unknown_kinds():
    assert make_rotation("none", 12, seed=0) is None
    assert head_rotation("none", 12, seed=0) is None
    with refused(UsageError, "'hadamrd'", "'hadamard'", "none", "random"):
        make_rotation("hadamrd", 12, seed=0)
    with refused(UsageError, 13, "rotate.kind"):
        make_rotation("hadamard", 13, seed=0)


def test_head_rotation_has_no_signs_and_leaves_odd_heads_with_a_reason():
    heads = head_rotation("hadamard", 80, seed=1)
    assert torch.equal(heads.matrix(), heads.transform.matrix())
    assert isinstance(head_rotation("random", 7, seed=1), RandomRotation)
    assert head_rotation("hadamard", 7, seed=1) is None
    check_line(head_rotation_skipped("hadamard", 7), "head dimension", 7)
    for kind, head_dim in (("hadamard", 80), ("random", 7), ("none", 7)):
        assert head_rotation_skipped(kind, head_dim) is None


# ---- functions on a layer's tensors ---------------------------------------------------------


def test_layer_functions_touch_only_what_they_name():
    tensors = random_layer()
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    tensors["self_attn.rotary"] = extra = torch.zeros(3, dtype=torch.bfloat16)
    out = fuse_and_rotate_layer(
        tensors, SPEC, make_rotation("hadamard", 16, 0), head_rotation("hadamard", 6, 0), 6
    )
    assert all(torch.equal(tensors[name], tensor) for name, tensor in before.items())
    assert out["self_attn.rotary"] is extra
    assert out["self_attn.q_proj.bias"] is tensors["self_attn.q_proj.bias"]
    assert out["input_layernorm.weight"].dtype == torch.float32
    rotated = {n for n, t in out.items() if t.dtype == torch.float64}
    assert rotated == set(tensors) - {
        *("self_attn.rotary", "self_attn.q_proj.bias"),
        *("input_layernorm.weight", "post_attention_layernorm.weight"),
    }
    assert all(tensor.is_contiguous() for tensor in out.values())


def test_r1_on_one_linear_is_the_matrix_product():
    tensors = fuse_norms_into_layer(random_layer(), SPEC)
    residual = make_rotation("random", 16, seed=1)
    Q = residual.matrix()
    out = rotate_layer(tensors, SPEC, residual, None, 6)
    name = "mlp.down_proj.weight"
    assert torch.allclose(out[name], Q.T @ tensors[name].double(), atol=1e-12)
    assert torch.allclose(out["mlp.up_proj.weight"], tensors["mlp.up_proj.weight"] @ Q, atol=1e-12)


def test_rotating_before_fusing_is_refused():
    with refused(CompressError, "'input_layernorm'"):
        rotate_layer(random_layer(), SPEC, make_rotation("hadamard", 16, 0), None, 6)


def test_missing_tensors_and_misfits_are_named():
    tensors = random_layer()
    residual, heads = make_rotation("hadamard", 16, 0), HadamardRotation(6, None)
    without = {n: t for n, t in tensors.items() if n != "mlp.up_proj.weight"}
    with refused(CheckpointError, "'mlp.up_proj.weight'"):
        fuse_and_rotate_layer(without, SPEC, residual, heads, 6)
    with refused(CompressError, 12, [24, 16]):
        fuse_and_rotate_layer(tensors, SPEC, make_rotation("hadamard", 12, 0), heads, 6)
    with refused(CompressError, 6, 8):
        rotate_layer(tensors, SPEC, None, heads, 8)
    with refused(CompressError, "'self_attn.o_proj.weight'", 24, 10):
        rotate_layer(tensors, SPEC, None, HadamardRotation(10, None), 10)


def test_head_and_embedding_in_pieces_and_in_the_asked_dtype(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(37, 12, generator=generator)
    gamma = torch.rand(12, generator=generator)
    residual = make_rotation("hadamard", 12, seed=0)
    Q = residual.matrix()
    monkeypatch.setattr(rotate, "VALUES_AT_ONCE", 96)
    head = fuse_and_rotate_head(weight, gamma, residual)
    assert torch.allclose(head, (weight.double() * gamma.double()) @ Q, atol=1e-12)
    embedding = rotate_embedding(weight, residual, dtype=torch.bfloat16)
    assert torch.equal(embedding, (weight.double() @ Q).bfloat16())
    assert torch.equal(rotate_embedding(weight, None), weight.double())
