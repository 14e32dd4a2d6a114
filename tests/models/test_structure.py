"""What is found on a family's class, and what is refused because it is not understood."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from compress.errors import UsageError
from compress.models import families
from compress.models.attention import NAME, attending, seen_by
from compress.models.families import Family
from compress.models.skeleton import Skeleton, empty_model
from compress.models.structure import embedding_scale, norm_kind, snapped, uniform_scale
from support.dense_families import tiny_dense, write_dense
from support.refusals import refused
from support.tiny_checkpoints import byte_tokenizer

TINY = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


# ---- found --------------------------------------------------------------------------------------


def test_multipliers_are_found_whatever_their_values(tmp_path):
    numbers = {"residual_multiplier": 1.4 / 62**0.5, "embedding_multiplier": 12.7}
    skeleton = Skeleton(write_dense(tmp_path / "model", "granite", **numbers))
    assert skeleton.spec.layer(0).scales == pytest.approx([1.4 / 62**0.5] * 2, rel=1e-12)
    assert skeleton.spec.embedding_scale == 12.7


def test_layers_may_differ(tmp_path):
    kinds = ["full_attention", "linear_attention", "linear_attention", "full_attention"]
    changes = {"num_hidden_layers": 4, "layer_types": kinds}
    spec = Skeleton(write_dense(tmp_path / "model", "qwen3_5_text", **changes)).spec
    assert [spec.layer(i).attends for i in range(4)] == [True, False, False, True]
    assert [spec.layer(i).attention for i in range(4)] == [
        *("self_attn", "linear_attn", "linear_attn", "self_attn")
    ]


def test_what_stands_before_the_output_projection_keeps_heads_as_they_are(tmp_path):
    clipped = Skeleton(write_dense(tmp_path / "clipped", "olmo")).spec.layer(0)
    plain = Skeleton(write_dense(tmp_path / "plain", "olmo", clip_qkv=None)).spec.layer(0)
    assert (clipped.value, plain.value) == (None, "self_attn.v_proj")


def test_an_option_of_a_family_decides(tmp_path):
    plain = write_dense(tmp_path / "plain", "hyperclovax", use_post_norm=False)
    assert Skeleton(plain).spec.unrotatable is None


class Shifted(nn.Module):
    """No norm that is known."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x):
        return self.weight * x / x.abs().amax(-1, keepdim=True)


def test_kinds_of_norms():
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    of = {name: tiny_dense(name).model.layers[0].input_layernorm for name in ("llama", "gemma")}
    assert norm_kind(nn.LayerNorm(8), x) == ("layer", 0.0)
    assert norm_kind(nn.RMSNorm(8, eps=1e-6), x) == ("rms", 0.0)
    assert norm_kind(Shifted(), x) == ("other", 0.0)
    wide = torch.randn(1, 5, 32, dtype=torch.float64)
    assert {name: norm_kind(norm, wide) for name, norm in of.items()} == {
        "llama": ("rms", 0.0),
        "gemma": ("rms", 1.0),
    }


def test_scales_are_short_numbers_where_they_were_meant():
    assert snapped(0.1 + 0.2) == 0.3
    assert snapped(2**0.5) == 2**0.5
    x = torch.rand(3, 4, dtype=torch.float64) + 1
    assert uniform_scale(3 * x, x) == 3.0
    assert embedding_scale(nn.Embedding(4, 2), torch.arange(2)) == 1.0
    with refused(UsageError, "embeddings"):
        uniform_scale(x + 1, x)


def test_large_shapes_cost_no_weights():
    """A layer of 405B parameters' model: only its norms are ever filled."""
    shape = {"hidden_size": 16384, "intermediate_size": 53248, "num_attention_heads": 128}
    config = AutoConfig.for_model("llama", **(TINY | shape | {"num_key_value_heads": 8}))
    model = empty_model(config)
    assert {p.device.type for p in model.parameters()} == {"meta"}


# ---- refused ------------------------------------------------------------------------------------

ODD = [
    ("nanochat", {}, ["embeddings"]),  # a norm behind the embedding
    ("falcon_h1", {}, ["mamba"]),  # three parts
    ("diffllama", {}, ["twice"]),
]


@pytest.mark.parametrize("kind, changes, words", ODD, ids=[kind for kind, _, _ in ODD])
def test_what_is_not_understood_is_refused_by_name(kind, changes, words, tmp_path, monkeypatch):
    monkeypatch.setitem(families.ARCHITECTURES, kind, Family("not in the table"))
    config = AutoConfig.for_model(kind, **(TINY | changes))
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "m")
    byte_tokenizer().save_pretrained(tmp_path / "m")
    with refused(UsageError, repr(kind), *words):
        Skeleton(tmp_path / "m")


# ---- the attention function ---------------------------------------------------------------------


def test_attention_is_its_own_again_afterwards():
    model = tiny_dense("qwen3")
    attention, before = model.model.layers[0].self_attn, model.config._attn_implementation
    x = torch.randn(1, 4, 32)
    rotary = model.model.rotary_emb(x, torch.arange(4)[None])
    inputs = {"position_embeddings": rotary, "attention_mask": None}
    with torch.no_grad():
        expected = attention(hidden_states=x, **inputs)[0]
        seen = seen_by(attention, x, inputs)
        assert seen.query.shape == (1, 4, 4, 8)
        assert seen.key.shape == seen.value.shape == (1, 2, 4, 8)
        assert seen.scaling == 8**-0.5
        assert torch.equal(attention(hidden_states=x, **inputs)[0], expected)
    assert model.config._attn_implementation == before
    assert NAME not in ALL_ATTENTION_FUNCTIONS
    with pytest.raises(ZeroDivisionError), attending(attention, lambda seen: 1 // 0):
        attention(hidden_states=x, **inputs)
    assert model.config._attn_implementation == before
    assert NAME not in ALL_ATTENTION_FUNCTIONS
