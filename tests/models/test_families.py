"""The table of families: its names exist, leave nothing out, and its structure is the real one."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from compress.errors import UsageError
from compress.models.families import ARCHITECTURES, architecture_of, head_dim_of
from support.refusals import refused
from support.tiny_checkpoints import FAMILIES, HIDDEN, tiny_model

every_family = pytest.mark.parametrize("family", FAMILIES)


@every_family
def test_names_cover_every_parameter_that_rotation_must_know(family):
    """q and k norms sit behind the projections; everything else in a layer is in the table."""
    model = tiny_model(family)
    names = architecture_of(model.config)
    spec, layer = names.layer(0), model.get_submodule(names.layers)[0]
    linears = {n for n, m in layer.named_modules() if isinstance(m, torch.nn.Linear)}
    assert set(spec.linears) == linears
    known = linears | {spec.input_norm, spec.post_norm}
    rest = {n.rpartition(".")[0] for n, _ in layer.named_parameters()} - known
    assert rest <= {f"{spec.attention}.q_norm", f"{spec.attention}.k_norm"}
    outside = {n for n, _ in model.named_parameters() if not n.startswith(names.layers)}
    assert outside == {f"{n}.weight" for n in (names.embedding, names.final_norm, names.head)}
    assert model.get_submodule(names.rotary) is not None


@every_family
def test_the_linears_of_a_group_read_one_input_and_groups_come_in_order(family):
    model = tiny_model(family)
    names = architecture_of(model.config)
    spec = names.layer(0)
    inputs, order = {}, []

    def note(name):
        def hook(module, arguments):
            inputs[name] = arguments[0].clone()
            order.append(name)

        return hook

    layer = model.get_submodule(names.layers)[0]
    for name in spec.linears:
        layer.get_submodule(name).register_forward_pre_hook(note(name))
    with torch.no_grad():
        model(torch.arange(12)[None])
    group_of = {name: i for i, group in enumerate(spec.groups) for name in group}
    assert [group_of[name] for name in order] == sorted(group_of[name] for name in order)
    for group in spec.groups:
        assert all(torch.equal(inputs[name], inputs[group[0]]) for name in group)
    first = [inputs[group[0]] for group in spec.groups]
    assert not any(torch.equal(a, b) for a, b in pairwise(first))


@every_family
def test_a_layer_adds_to_the_residual_through_two_linears_only(family):
    """What fusing and rotating rely on: with both outputs at zero the layer is the identity."""
    model = tiny_model(family)
    names = architecture_of(model.config)
    spec, layer = names.layer(0), model.get_submodule(names.layers)[0]
    x = torch.randn(1, 10, HIDDEN, generator=torch.Generator().manual_seed(0))
    rotary = model.get_submodule(names.rotary)(x, torch.arange(10)[None])

    def forward():
        with torch.no_grad():
            y = layer(x, position_embeddings=rotary, attention_mask=None)
        return y[0] if isinstance(y, tuple) else y

    assert not torch.allclose(forward(), x)
    for name in (spec.output, spec.mlp_out):
        for parameter in layer.get_submodule(name).parameters():
            parameter.data.zero_()
    assert torch.equal(forward(), x)


@every_family
def test_head_dim_is_that_of_the_attention_module(family):
    model = tiny_model(family)
    attention = model.get_submodule(architecture_of(model.config).layers)[0].self_attn
    assert head_dim_of(model.config) == attention.head_dim


def test_an_unknown_family_is_refused_with_the_known_ones_and_the_nearest():
    with refused(UsageError, "'lama'", "'llama'", *ARCHITECTURES):
        architecture_of(SimpleNamespace(model_type="lama"))
