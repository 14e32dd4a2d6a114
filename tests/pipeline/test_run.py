"""The run: same function after rotation, files that plain transformers reads, the same bytes again.

Oracles: transformers' own model, and the weights that the documented layout stands for.
"""

import json
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, CompressedTensorsConfig

from compress.data.prompts import calibration_data
from compress.data.windows import CalibrationWindows
from compress.models.skeleton import Skeleton
from compress.pipeline.inputs import RunInputs
from compress.pipeline.run import run
from compress.recipe.recipe import Recipe
from compress.registry import TOKEN_IMPORTANCE
from support.tiny_checkpoints import (
    FAMILIES,
    LAYERS,
    WINDOWS,
    all_count,
    dequantised,
    load_whole,
    logits_of,
    random_ids,
    read_tensors,
    recipe_for,
    relative_error,
    tiny_model,
    unpack,
    weight_files,
    widths_of,
    write_checkpoint,
)
from support.token_contexts import told

tied_or_not = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
DOWN = "re:.*down_proj$"


def config_of(folder) -> dict:
    return json.loads((folder / "config.json").read_text())


def by_hand(folder, family: str, widths: dict[str, int]) -> torch.nn.Module:
    """The result as an ordinary fp32 model, its weights dequantised from the files."""
    plain = dequantised(read_tensors(folder), widths)
    tied = config_of(folder)["tie_word_embeddings"]
    if tied:
        plain["lm_head.weight"] = plain["model.embed_tokens.weight"]
    model = tiny_model(family, tied=tied)
    model.load_state_dict(plain, strict=True)
    return model


# ---- rotation keeps the function ----------------------------------------------------------------


@tied_or_not
@pytest.mark.parametrize("kind", ["hadamard", "random"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_rotated_checkpoint_is_a_plain_one_with_the_same_logits(
    checkpoint, press, family, kind, tied
):
    source = checkpoint(family, tied=tied)
    folder = press(recipe_for(source, rotate=kind, quantize={"method": "none"}))
    config = config_of(folder)
    assert "quantization_config" not in config
    assert config["tie_word_embeddings"] is False
    before, after = read_tensors(source), read_tensors(folder)
    assert after.keys() == before.keys() | {"lm_head.weight"}
    turned = [n for n in before if n.endswith("_proj.weight") or "embed_tokens" in n]
    assert not any(torch.allclose(after[n], before[n], atol=1e-3) for n in turned)
    norms = [n for n in after if "layernorm" in n or n == "model.norm.weight"]
    assert all(bool((after[n] == 1).all()) for n in norms)
    assert relative_error(logits_of(folder), logits_of(source)) < 1e-5


@tied_or_not
def test_doing_nothing_copies_the_tensors(checkpoint, press, tied):
    source = checkpoint("qwen2", dtype=torch.bfloat16, tied=tied)
    folder = press(recipe_for(source, quantize={"method": "none"}))
    before, after = read_tensors(source), read_tensors(folder)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert config_of(folder)["tie_word_embeddings"] is tied


def test_linears_left_in_16_bits_keep_every_bit(checkpoint, press):
    """Whichever way they are left out, and whatever becomes of the linears beside them."""
    ways = [{"match": "re:.*o_proj", "bits": 16}, {"match": "re:.*up_proj", "ignore": True}]
    quantize = {"bits": 2, "ignore": ["lm_head", DOWN], "overrides": ways}
    source = checkpoint("llama-biased", dtype=torch.bfloat16)
    before, after = read_tensors(source), read_tensors(press(recipe_for(source, quantize=quantize)))
    left = [
        n for n in before if n.endswith(("o_proj.weight", "up_proj.weight", "down_proj.weight"))
    ]
    assert len(left) == 3 * LAYERS
    quantised = {n for n in before if n.endswith("_proj.weight")} - set(left)
    assert quantised.isdisjoint(after)
    assert all(torch.equal(after[name], before[name]) for name in before.keys() - quantised)


def test_model_dtype_decides_what_is_written(checkpoint, press):
    source = {"path": str(checkpoint()), "dtype": "float16"}
    folder = press(recipe_for(checkpoint(), model=source, quantize={"method": "none"}))
    assert {tensor.dtype for tensor in read_tensors(folder).values()} == {torch.float16}
    config = config_of(folder)
    assert config.get("dtype", config.get("torch_dtype")) == "float16"


# ---- quantised checkpoints load elsewhere -------------------------------------------------------

SCHEMES = {
    "3 bits": {"bits": 3},
    "rows": {"bits": 4, "group_size": "channel"},
    "act-order": {"bits": 3, "act_order": True},
    "rtn": {"method": "rtn", "bits": 4},
    "widths": {
        "bits": 3,
        "overrides": [
            {"match": DOWN, "bits": 8, "group_size": 64},
            {"match": "re:.*0.self_attn.[qkv]_proj", "bits": 2},
            {"match": "re:.*o_proj", "ignore": True},
        ],
    },
    "head": {"bits": 4, "ignore": []},
}


@tied_or_not
@pytest.mark.parametrize("kind", ["none", "hadamard"])
@pytest.mark.parametrize("family", ["llama-biased", "mistral", "qwen2", "qwen3"])
def test_every_family_loads_in_transformers_as_dequantised_by_hand(
    checkpoint, press, family, kind, tied
):
    """`logits_of` fails for a missing, unexpected or misshapen key."""
    recipe = recipe_for(checkpoint(family, tied=tied), rotate=kind, quantize={"bits": 3})
    folder = press(recipe)
    expected = logits_of(by_hand(folder, family, widths_of(recipe, checkpoint(family))))
    assert relative_error(logits_of(folder), expected) < 1e-6


@tied_or_not
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_loads_in_transformers_as_dequantised_by_hand(checkpoint, press, scheme, tied):
    recipe = recipe_for(checkpoint(tied=tied), quantize=SCHEMES[scheme])
    folder = press(recipe)
    widths = widths_of(recipe, checkpoint())
    packed = [n for n in read_tensors(folder) if n.endswith(".weight_packed")]
    assert sorted(packed) == sorted(f"{name}.weight_packed" for name in widths)
    expected = logits_of(by_hand(folder, "llama", widths))
    assert relative_error(logits_of(folder), expected) < 1e-6


@pytest.mark.filterwarnings("ignore:You passed .quantization_config")
@pytest.mark.parametrize("size", [32, "channel"])
def test_asymmetric_weights_load_with_dequantize(checkpoint, press, size):
    quantize = {"bits": 3, "group_size": size, "symmetric": False}
    recipe = recipe_for(checkpoint("qwen2"), rotate="hadamard", quantize=quantize)
    folder = press(recipe)
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    expected = logits_of(by_hand(folder, "qwen2", widths_of(recipe, checkpoint("qwen2"))))
    assert relative_error(logits_of(load_whole(folder, **options)), expected) < 1e-6


def test_asymmetric_weights_with_16_bit_scales_pass_the_self_check(tmp_path):
    """transformers rounds what it dequantises to the scales' dtype, which the check leaves out."""
    source = write_checkpoint(tmp_path / "model", dtype=torch.bfloat16)
    quantize = {"bits": 8, "group_size": 32, "symmetric": False}
    recipe = recipe_for(source, quantize=quantize)
    result = run(recipe, tmp_path / "out", windows=WINDOWS)
    scale = read_tensors(result.path)["model.layers.0.mlp.up_proj.weight_scale"]
    assert scale.dtype == torch.bfloat16
    assert result.self_check["relative_error"] < 1e-5


def test_the_widths_of_a_recipe_order_its_damage(checkpoint, press):
    source = checkpoint()
    original = logits_of(source)
    errors = [
        relative_error(logits_of(press(recipe_for(source, quantize={"bits": bits}))), original)
        for bits in (8, 5, 3, 2)
    ]
    assert errors == sorted(errors)
    assert 0 < errors[0] < 0.05


def test_a_quantised_head_is_untied_and_packed(checkpoint, press):
    source = checkpoint(tied=True)
    folder = press(recipe_for(source, quantize={"bits": 8, "ignore": []}))
    assert config_of(folder)["tie_word_embeddings"] is False
    before, after = read_tensors(source), read_tensors(folder)
    embedding = "model.embed_tokens.weight"
    assert torch.equal(after[embedding], before[embedding])
    head = dequantised(after, dict.fromkeys(widths_of_all(folder), 8))["lm_head.weight"]
    assert relative_error(head, before[embedding]) < 0.02


def widths_of_all(folder) -> list[str]:
    suffix = ".weight_packed"
    return [n.removesuffix(suffix) for n in read_tensors(folder) if n.endswith(suffix)]


def test_the_result_passes_its_self_check_and_brings_its_companions(checkpoint, text, tmp_path):
    recipe = recipe_for(checkpoint(dtype=torch.bfloat16), text, rotate="hadamard")
    result = run(recipe, tmp_path / "out")
    assert result.path == tmp_path / "out"
    assert result.self_check["relative_error"] < 1e-5
    assert result.self_check["tokens"] == recipe.calibration.length
    assert not (result.path / ".modelpress").exists()
    words = "the quick brown fox"
    tokenizers = [AutoTokenizer.from_pretrained(p) for p in (recipe.model.path, result.path)]
    assert tokenizers[0](words) == tokenizers[1](words)
    assert (result.path / "generation_config.json").is_file()
    assert Recipe.load(result.path / "recipe.yaml") == recipe
    assert not any("not loaded again" in warning for warning in result.warnings)


def test_a_result_that_nobody_loaded_again_says_so(checkpoint, tmp_path):
    result = run(recipe_for(checkpoint()), tmp_path / "out", windows=WINDOWS, self_check=False)
    assert result.self_check == {}
    assert "the result was not loaded again to be checked: --no-self-check" in result.warnings


@tied_or_not
@pytest.mark.parametrize("head", ["in 16 bits", "quantised"])
@pytest.mark.parametrize("family", FAMILIES)
def test_activations_at_the_end_of_the_walk_are_those_of_the_checkpoint(
    checkpoint, tmp_path, monkeypatch, family, head, tied
):
    """Every layer was fitted to what the quantised ones before it give: the logits that the run
    has in the end are those of plain transformers with what it wrote."""
    errors = []

    def compare(folder, probe):
        seen = load_file(probe)
        assert torch.equal(seen["input_ids"], WINDOWS.input_ids[:1])
        errors.append(relative_error(seen["logits"], logits_of(folder, seen["input_ids"])))
        return {}

    monkeypatch.setattr("compress.pipeline.run.reload_and_compare", compare)
    quantize = {"bits": 3, "ignore": ["lm_head"] if head == "in 16 bits" else []}
    recipe = recipe_for(checkpoint(family, tied=tied), rotate="hadamard", quantize=quantize)
    run(recipe, tmp_path / "out", windows=WINDOWS)
    (error,) = errors
    assert error < 1e-5


# ---- the same bytes -----------------------------------------------------------------------------

RSQ = {"rotate": "hadamard", "quantize": {"bits": 3, "token_importance": "attention_concentration"}}


def test_the_same_recipe_gives_the_same_bytes_and_so_does_the_one_beside_the_result(
    checkpoint, text, press
):
    recipe = recipe_for(checkpoint("mistral"), text, **RSQ)
    first, second = press(recipe, None), press(recipe, None)
    third = press(Recipe.load(first / "recipe.yaml"), None)
    assert weight_files(first) == weight_files(second) == weight_files(third)
    assert config_of(first) == config_of(second) == config_of(third)


@pytest.mark.parametrize("section", ["rotate", "calibration"])
def test_another_seed_gives_other_bytes(checkpoint, text, press, section):
    base = {"rotate": {"kind": "hadamard"}}
    recipes = [
        recipe_for(checkpoint(), text, **base | {section: base.get(section, {}) | {"seed": seed}})
        for seed in (0, 1)
    ]
    first, second = (weight_files(press(recipe, None)) for recipe in recipes)
    assert first != second


@pytest.mark.parametrize("importance", ["uniform", "attention_concentration"])
def test_where_activations_live_changes_nothing(checkpoint, text, press, importance):
    """More windows than a batch holds, so that several activation files exist."""
    results = [
        press(
            recipe_for(
                checkpoint("qwen2"),
                text,
                calibration={"samples": 70, "length": 64, "offload": offload},
                quantize={"token_importance": importance},
            ),
            None,
        )
        for offload in ("ram", "disk", "auto")
    ]
    assert weight_files(results[0]) == weight_files(results[1]) == weight_files(results[2])


def test_shards_hold_what_one_file_would(checkpoint, press):
    source = checkpoint()
    whole, sharded = (
        press(recipe_for(source, save={"shard_size": size})) for size in ("5GB", "50KB")
    )
    assert len(weight_files(whole)) == 1
    assert len(weight_files(sharded)) > 3
    one, many = read_tensors(whole), read_tensors(sharded)
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)
    assert torch.equal(logits_of(whole), logits_of(sharded))


def test_overwriting_leaves_nothing_of_what_was_there(checkpoint, press, tmp_path):
    recipe = recipe_for(checkpoint())
    folder = press(recipe_for(checkpoint("qwen2"), save={"shard_size": "50KB"}))
    run(recipe, folder, windows=WINDOWS, self_check=False, overwrite=True)
    assert weight_files(folder) == weight_files(press(recipe))


# ---- tokens -------------------------------------------------------------------------------------


def test_equal_token_weights_are_plain_gptq(checkpoint, press):
    """r_min = r_max makes every strategy uniform, to the bit."""
    equal = {"name": "attention_concentration", "minimum": 1.0, "maximum": 1.0}
    results = [
        press(recipe_for(checkpoint(), quantize={"token_importance": importance}))
        for importance in ("uniform", equal, "attention_concentration")
    ]
    uniform, same, other = map(weight_files, results)
    assert uniform == same != other


def test_drawn_windows_count_all_their_tokens(checkpoint, text, press):
    """The recipe's own windows are those of its dataset with a mask of ones."""
    from compress.data.text import load_documents
    from compress.data.windows import draw_windows

    recipe = recipe_for(checkpoint(), text)
    c = recipe.calibration
    tokenizer = AutoTokenizer.from_pretrained(recipe.model.path)
    drawn = draw_windows(load_documents(str(text), "train"), tokenizer, c.samples, c.length)
    explicit = press(recipe, all_count(drawn.input_ids))
    assert weight_files(press(recipe, None)) == weight_files(explicit)


def test_an_expanded_recipe_is_calibrated_on_its_windows_and_their_shifts(checkpoint, text, press):
    recipes = [
        recipe_for(checkpoint(), text, calibration={"expansion": expansion}) for expansion in (1, 3)
    ]
    plain, expanded = (weight_files(press(recipe, None)) for recipe in recipes)
    drawn = calibration_data(
        RunInputs.of(recipes[0], Skeleton(checkpoint())).source, Skeleton(checkpoint())
    )
    shifts = [drawn.input_ids.roll(8 * k, dims=1) for k in range(3)]  # 24 tokens, a third each
    by_hand = torch.stack(shifts, dim=1).flatten(0, 1)
    assert expanded == weight_files(press(recipes[0], all_count(by_hand)))
    assert plain == weight_files(press(recipes[0], drawn)) != expanded


@pytest.mark.parametrize("family", ["llama", "qwen2-sliding"])
def test_only_the_first_tokens_is_gptq_on_windows_that_end_there(checkpoint, press, family):
    """Attention is causal: what follows the tokens that count does not exist for them.

    Another length of a product may round a code the other way, and the codes after it.
    """
    windows = random_ids(40, 64)
    first = {"quantize": {"token_importance": {"name": "first_n", "minimum": 0}}}
    results = {
        "first eighth of 64": press(recipe_for(checkpoint(family), **first), all_count(windows)),
        "8 tokens": press(recipe_for(checkpoint(family)), all_count(windows[:, :8])),
        "64 tokens": press(recipe_for(checkpoint(family)), all_count(windows)),
    }

    def codes(folder):
        packed = [t for n, t in read_tensors(folder).items() if n.endswith("weight_packed")]
        return torch.cat([unpack(words, 4, 8 * words.shape[1]).flatten() for words in packed])

    found, expected, other = map(codes, results.values())
    assert (found == expected).double().mean() > 0.99
    assert (other == expected).double().mean() < 0.9


@pytest.mark.parametrize("importance", TOKEN_IMPORTANCE.shipped)
def test_what_stands_in_padding_changes_nothing(checkpoint, press, importance):
    """Windows end in 0 to 5 padding tokens; whatever they are, the bytes are the same, head too."""
    ids = WINDOWS.input_ids
    length = ids.shape[1] - torch.arange(len(ids))[:, None]
    mask = torch.arange(ids.shape[1]) < length
    quantize = {"token_importance": told(importance), "ignore": []}
    recipe = recipe_for(checkpoint("mistral"), quantize=quantize)
    results = []
    for seed in (1, 2):
        garbage = random_ids(*ids.shape, seed=seed)
        padded = CalibrationWindows(torch.where(mask, ids, garbage), mask)
        results.append(weight_files(press(recipe, padded)))
    assert results[0] == results[1]
    assert results[0] != weight_files(press(recipe, all_count(ids)))


def test_every_linear_is_fitted_to_what_the_quantised_ones_before_it_give(checkpoint, press):
    """Rounding q, k and v to 2 bits changes what comes behind them, and nothing before."""
    before = {"match": "re:.*0.self_attn.[qkv]_proj"}
    behind = {"match": "re:.*1.mlp"}
    results = {
        name: read_tensors(press(recipe_for(checkpoint(), quantize={"overrides": [override]})))
        for name, override in {
            "q, k, v in 2 bits": before | {"bits": 2},
            "q, k, v left out": before | {"ignore": True},
            "last MLP left out": behind | {"ignore": True},
        }.items()
    }
    first, other, third = results.values()
    for name in ("0.self_attn.o_proj", "0.mlp.up_proj", "0.mlp.down_proj", "1.self_attn.q_proj"):
        packed = f"model.layers.{name}.weight_packed"
        assert not torch.equal(first[packed], other[packed]), name
    plain = read_tensors(press(recipe_for(checkpoint())))
    same = [n for n in third if n.endswith("weight_packed")]
    assert same
    assert all(torch.equal(third[name], plain[name]) for name in same)


@pytest.mark.parametrize("importance", TOKEN_IMPORTANCE.shipped)
def test_no_token_passes_a_linear_more_than_twice(checkpoint, press, importance):
    """Once for the layer itself, and where token importance has to look ahead."""
    tokens: Counter = Counter()  # counts by module; keeping them alive keeps them apart

    def count(module, arguments, output):
        if isinstance(module, torch.nn.Linear):
            tokens[module] += arguments[0].numel() // arguments[0].shape[-1]

    hook = torch.nn.modules.module.register_module_forward_hook(count)
    try:
        quantize = {"token_importance": told(importance)}
        press(recipe_for(checkpoint("qwen3"), quantize=quantize), check_source=False)
    finally:
        hook.remove()
    passes = Counter(count / WINDOWS.input_ids.numel() for count in tokens.values())
    expected = {
        "attention_concentration": {1: 5 * LAYERS, 2: 2 * LAYERS},  # q and k
        "activation_difference": {2: 7 * LAYERS},
    }
    assert passes == expected.get(importance, {1: 7 * LAYERS})
