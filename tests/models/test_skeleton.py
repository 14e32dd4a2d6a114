"""The skeleton against transformers: same tensors, same hidden states, one layer's memory."""

import gc
import shutil
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.errors import CheckpointError, UsageError
from compress.models.pretrained import local_folder
from compress.models.skeleton import Skeleton
from compress.quantization.token_weights import keys_seen
from support.refusals import refused
from support.tiny_checkpoints import (
    FAMILIES,
    HIDDEN,
    LAYERS,
    WINDOW,
    change_config,
    load_whole,
    random_ids,
    relative_error,
)

every_family = pytest.mark.parametrize("family", FAMILIES)
LENGTH = 3 * WINDOW


def on_meta(module: torch.nn.Module) -> set[bool]:
    return {parameter.is_meta for parameter in module.parameters()}


# ---- tensors ------------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_tensors_are_those_of_transformers(checkpoint, family, tied):
    folder = checkpoint(family, tied=tied)
    skeleton, expected = Skeleton.open(str(folder)), load_whole(folder).state_dict()
    read = {}
    for index in range(skeleton.num_layers):
        prefix = f"{skeleton.spec.layers}.{index}."
        read |= {prefix + name: tensor for name, tensor in skeleton.read_layer(index).items()}
    outside = [skeleton.spec.embedding, skeleton.spec.final_norm]
    outside += [] if tied else [skeleton.spec.head]
    read |= {f"{name}.weight": skeleton.read(name) for name in outside}
    if tied:
        expected.pop("lm_head.weight")
    assert skeleton.tied is tied
    assert read.keys() == expected.keys()
    for name, tensor in read.items():
        assert torch.equal(tensor, expected[name]), name


def test_tensors_keep_the_dtype_of_the_file(checkpoint):
    skeleton = Skeleton.open(str(checkpoint(dtype=torch.bfloat16)))
    assert skeleton.dtype is torch.bfloat16
    assert {t.dtype for t in skeleton.read_layer(0).values()} == {torch.bfloat16}


def test_a_sharded_checkpoint_reads_like_a_whole_one(checkpoint, tmp_path):
    folder = checkpoint()
    load_whole(folder).save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    whole, sharded = Skeleton(folder), Skeleton(tmp_path)
    for index in range(LAYERS):
        expected, found = whole.read_layer(index), sharded.read_layer(index)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@every_family
def test_linear_names_are_all_linears_of_the_model(checkpoint, family):
    folder = checkpoint(family)
    names = [n for n, m in load_whole(folder).named_modules() if isinstance(m, torch.nn.Linear)]
    found = Skeleton(folder).linear_names()
    assert sorted(found) == sorted(names)
    assert len(set(found)) == len(found)


# ---- the forward of single layers ---------------------------------------------------------------


@every_family
def test_layers_one_by_one_give_the_hidden_states_of_transformers(checkpoint, family):
    """The oracle is the whole model with transformers' plainest attention and its own masks."""
    folder = checkpoint(family)
    whole = load_whole(folder, attn_implementation="eager")
    ids = random_ids(2, LENGTH)
    with torch.no_grad():
        expected = whole.model(ids, output_hidden_states=True).hidden_states
        skeleton = Skeleton(folder)
        x = torch.nn.functional.embedding(ids, skeleton.read(skeleton.spec.embedding))
        for index in range(skeleton.num_layers):
            assert relative_error(x, expected[index]) < 3e-6, f"input of layer {index}"
            with skeleton.layer(index, skeleton.read_layer(index)) as layer:
                y = layer(x, **skeleton.layer_inputs(index, x))
            x = y[0] if isinstance(y, tuple) else y
        # transformers lists the last hidden state behind the final norm
        assert relative_error(whole.model.norm(x), expected[-1]) < 3e-6


def test_only_sliding_layers_have_a_window(checkpoint):
    x, windows = torch.zeros(1, LENGTH, HIDDEN), {}
    for family in ("llama", "mistral", "qwen2", "qwen2-sliding"):
        skeleton = Skeleton(checkpoint(family))
        found = [keys_seen(skeleton.layer_inputs(index, x)) for index in range(LAYERS)]
        windows[family] = [window for window, seen in found if seen is None]
    assert windows == {
        "llama": [None, None],
        "mistral": [WINDOW, WINDOW],
        "qwen2": [None, None],
        "qwen2-sliding": [None, WINDOW],
    }


@pytest.mark.parametrize("length", [WINDOW - 1, WINDOW, WINDOW + 1])
def test_a_query_sees_as_many_keys_as_the_window_holds(checkpoint, length):
    skeleton = Skeleton(checkpoint("mistral"))
    mask = skeleton.layer_inputs(0, torch.zeros(1, length, HIDDEN))["attention_mask"]
    if length <= WINDOW:
        assert mask is None  # plain causal attention
    else:
        assert mask[0, 0].sum(-1).tolist() == [min(q + 1, WINDOW) for q in range(length)]


# ---- memory -------------------------------------------------------------------------------------


@every_family
def test_nothing_is_materialised_outside_a_layer(checkpoint, family):
    skeleton = Skeleton(checkpoint(family))
    assert on_meta(skeleton.model) == {True}
    layers = skeleton.model.get_submodule(skeleton.spec.layers)
    with skeleton.layer(1, skeleton.read_layer(1)) as layer:
        assert layer is layers[1]
        assert on_meta(layer) == {False}
        assert on_meta(layers[0]) == {True}
        assert {p.dtype for p in layer.parameters()} == {torch.float32}
        assert not any(p.requires_grad for p in layer.parameters())
        held = [weakref.ref(parameter) for parameter in layer.parameters()]
    assert on_meta(skeleton.model) == {True}
    gc.collect()
    assert [ref() for ref in held] == [None] * len(held)


def test_a_layer_is_emptied_when_the_work_in_it_fails(checkpoint):
    skeleton = Skeleton(checkpoint())
    with pytest.raises(ZeroDivisionError), skeleton.layer(0, skeleton.read_layer(0)):
        raise ZeroDivisionError
    assert on_meta(skeleton.model) == {True}


def test_a_layer_is_not_filled_by_halves(checkpoint):
    skeleton = Skeleton(checkpoint())
    tensors = skeleton.read_layer(0)
    tensors.popitem()
    with (
        pytest.raises(CheckpointError, match="v_proj"),
        skeleton.layer(0, tensors),
    ):
        pass


# ---- what cannot be opened ----------------------------------------------------------------------


@pytest.fixture
def copy(checkpoint, tmp_path):
    """A checkpoint of one's own, to damage."""
    return shutil.copytree(checkpoint(), tmp_path / "copy")


def test_an_unknown_family_is_refused_with_the_known_ones(copy):
    change_config(copy, model_type="gpt2", architectures=["GPT2LMHeadModel"])
    with refused(UsageError, "'gpt2'", "llama", "mistral", "qwen2", "qwen3"):
        Skeleton(copy)


def test_a_quantised_model_is_refused(copy):
    change_config(copy, quantization_config={"quant_method": "gptq", "bits": 4})
    with refused(UsageError, copy, "quantised"):
        Skeleton(copy)


def test_a_missing_tensor_is_named_before_any_work(copy):
    tensors = load_file(copy / "model.safetensors")
    lost = "model.layers.1.mlp.up_proj.weight"
    del tensors[lost]
    save_file(tensors, copy / "model.safetensors")
    with refused(CheckpointError, lost):
        Skeleton(copy)


def test_a_tensor_of_another_shape_than_the_config_says_is_named(copy):
    change_config(copy, intermediate_size=160)
    with refused(CheckpointError, "gate_proj.weight", (128, 64), (160, 64)):
        Skeleton(copy)


def test_a_place_that_is_no_model_is_refused(tmp_path):
    file = tmp_path / "model.bin"
    file.touch()
    with refused(UsageError, file):
        local_folder(str(file))
    with refused(UsageError, tmp_path, "config.json"):
        Skeleton.open(str(tmp_path))
