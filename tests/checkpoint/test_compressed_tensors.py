"""The section of config.json as compressed-tensors and plain transformers read it."""

import itertools

import pytest
import torch
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    apply_quantization_config,
)

from compress.checkpoint.compressed_tensors import module_schemes, quantization_config
from compress.checkpoint.engines import must_dequantize_on_load
from compress.scheme import Scheme
from support.tiny_quantised import MIXED, round_weight, tiny_llama, write_quantised


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def test_modules_of_one_scheme_share_a_group():
    schemes = {f"m.{i}": MIXED[i % 3] for i in range(7)}
    config = quantization_config(schemes, ["lm_head"])
    targets = [group["targets"] for group in config["config_groups"].values()]
    assert targets == [["m.0", "m.3", "m.6"], ["m.1", "m.4"], ["m.2", "m.5"]]
    assert module_schemes(config, [*schemes, "lm_head", "other"]) == schemes
    uniform = quantization_config(dict.fromkeys(schemes, MIXED[0]), ["lm_head"])
    assert [group["targets"] for group in uniform["config_groups"].values()] == [["Linear"]]
    assert module_schemes(uniform, [*schemes, "lm_head"]) == dict.fromkeys(schemes, MIXED[0])


def test_a_name_wins_over_a_pattern_and_a_pattern_over_a_class():
    config = {
        "ignore": ["re:.*router"],
        "config_groups": {
            str(bits): {"targets": [target], "weights": {"num_bits": bits, "group_size": -1}}
            for bits, target in [(8, "Linear"), (4, "re:.*down"), (2, "a.down")]
        },
    }
    found = module_schemes(config, ["a.down", "b.down", "b.up", "b.router"])
    assert {name: scheme.bits for name, scheme in found.items()} == {
        "a.down": 2,
        "b.down": 4,
        "b.up": 8,
    }
    assert found["b.up"] == Scheme(8, None)


def test_one_of_several_targets_is_chosen_as_by_compressed_tensors():
    """Patterns that overlap, in every order, beside classes of other modules than linears."""
    targets = ["re:.*mlp.*", "re:.*down_proj", "re:.*layers.1.*", "Embedding", "Linear"]
    for order in itertools.permutations(range(len(targets))):
        groups = {
            f"group_{i}": {
                "targets": [targets[i], "model.layers.0.mlp.gate_proj"],
                "weights": {"num_bits": 2 + i, "strategy": "channel"},
            }
            for i in order
        }
        section = {"quant_method": "compressed-tensors", "config_groups": groups}
        model = tiny_llama()
        apply_quantization_config(model, QuantizationConfig(**section))
        linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
        found = module_schemes(section, linears)
        expected = {n: m.quantization_scheme.weights.num_bits for n, m in linears.items()}
        assert {name: scheme.bits for name, scheme in found.items()} == expected


def test_what_a_group_does_not_say_is_as_in_compressed_tensors():
    usual = QuantizationArgs()
    group = {"targets": ["Linear"], "weights": {}, "input_activations": {}}
    found = module_schemes({"config_groups": {"group_0": group}}, ["up_proj"])
    assert found["up_proj"] == Scheme(
        usual.num_bits,
        usual.group_size,
        usual.symmetric,
        activation_bits=usual.num_bits,
        per_tensor=usual.strategy == "tensor",
        act_order=usual.actorder is not None,
    )


# ---- plain transformers -------------------------------------------------------------------------


def load_plain(folder, **options):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, **options
    )


def test_mixed_widths_load_in_plain_transformers(mixed):
    model, report = load_plain(mixed.folder)
    assert not any(report.values()), report
    with torch.no_grad():
        logits = model(mixed.input_ids).logits
    assert relative_error(logits, mixed.logits) <= 1e-5


@pytest.mark.parametrize("tied", [False, True])
def test_one_width_for_the_class_linear_loads(tmp_path, tied):
    made = write_quantised(tmp_path, [Scheme(3, 32)], tie_word_embeddings=tied)
    model, report = load_plain(made.folder)
    assert not any(report.values()), report
    with torch.no_grad():
        assert relative_error(model(made.input_ids).logits, made.logits) <= 1e-5


@pytest.mark.parametrize("scheme", [Scheme(3, 32, False), Scheme(4, None, False)])
def test_one_asymmetric_scheme_loads_dequantised(tmp_path, scheme):
    from transformers import CompressedTensorsConfig

    made = write_quantised(tmp_path, [scheme])
    assert must_dequantize_on_load(quantization_config(made.modules, []))
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    with pytest.warns(UserWarning, match="loading attributes"):
        model, _ = load_plain(made.folder, **options)
    with torch.no_grad():
        assert relative_error(model(made.input_ids).logits, made.logits) <= 1e-5


def test_rounding_in_these_tests_is_rounding():
    """The oracle above rests on it: no weight moves by more than half a step where none clips."""
    weight = torch.randn(8, 64)
    scheme = Scheme(4, 32, symmetric=False)
    _, scale, _, rounded = round_weight(weight, scheme)
    step = scale.repeat_interleave(32, dim=1)
    assert ((rounded - weight).abs() <= step * 1.01).all()
