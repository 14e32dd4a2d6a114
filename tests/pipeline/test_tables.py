"""Embedding and head in fewer bits: what is planned, what is written, and who reads it.

The oracle is transformers on the result, and the tables rounded here.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import compress
from compress.checkpoint.export import export
from compress.checkpoint.inspect import inspect
from compress.checkpoint.packed import PackedLinears, UnpackableError
from compress.errors import RecipeError
from compress.kernels.embedding import QuantEmbedding
from compress.kernels.linear import QuantLinear
from compress.kernels.reference import dequantize
from compress.pipeline.inputs import RunInputs
from compress.pipeline.plan import make_plan
from compress.pipeline.run import run
from support.gguf_files import FILE, Read
from support.refusals import refused
from support.tiny_checkpoints import (
    WINDOWS,
    all_count,
    load_whole,
    logits_of,
    random_ids,
    recipe_for,
    relative_error,
    weight_files,
    write_text,
)
from support.watching import Watch

TABLE, HEAD = "model.embed_tokens", "lm_head"
IDS = random_ids(2, 24, seed=5)
RSQ = {"rotate": "hadamard", "quantize": {"token_importance": "attention_concentration"}}


def tables(embedding=None, head=None, method="rtn", format="auto", **sections):
    """Sections of a recipe; a table is its width, or its width and group size."""
    quantize = {"method": method} | sections.pop("quantize", {})
    for name, asked in (("embedding", embedding), ("head", head)):
        if asked is not None:
            bits, group_size = asked if isinstance(asked, tuple) else (asked, "channel")
            quantize[name] = {"bits": bits, "group_size": group_size}
    return {"quantize": quantize, "save": {"table_format": format}} | sections


def plan_of(recipe):
    return make_plan(RunInputs.open(recipe))


CASES = {
    "tied": (True, tables(8)),
    "tied-groups": (True, tables((8, 32))),
    "tied-both": (True, tables(8, 8)),
    "tied-words": (True, tables(8, format="pack-quantized")),
    "tied-4": (True, tables(4)),
    "tied-differ": (True, tables(8, (8, 32))),
    "tied-head": (True, tables(None, 8)),
    "tied-rotated": (True, tables(8, 8, rotate="hadamard", method="gptq")),
    "both": (False, tables(8, 8, method="gptq")),
    "embedding": (False, tables(8)),
    "head": (False, tables(None, (6, 32), method="gptq")),
    "words": (False, tables((4, 32), (3, 32), format="pack-quantized")),
    "rsq": (False, tables(8, 8, method="gptq", **RSQ)),
}


@pytest.mark.parametrize("case", CASES)
def test_every_reader_gets_the_tables_that_were_planned(checkpoint, tmp_path, case):
    tied, sections = CASES[case]
    source = checkpoint("llama", tied=tied, dtype=torch.bfloat16)
    recipe = recipe_for(source, **sections)
    plan = plan_of(recipe)
    result = run(recipe, tmp_path / "out", windows=WINDOWS, check_source=False)
    assert result.self_check["relative_error"] < 1e-4
    found = inspect(tmp_path / "out")
    assert found["bytes"] == plan.bytes
    assert found["average_bits"] == pytest.approx(plan.average_bits)
    planned = {module.name: module for module in plan.modules}
    assert {m["name"]: m["bits"] for m in found["modules"] if m["symmetric"]} == {
        name: module.bits for name, module in planned.items()
    }
    section = json.loads((tmp_path / "out" / "config.json").read_text())
    assert section["tie_word_embeddings"] == (case in ("tied", "tied-groups", "tied-both"))
    model, _ = compress.load(tmp_path / "out", dtype=torch.float32)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, QuantEmbedding) == (TABLE in planned)
    assert isinstance(head, QuantLinear) == (HEAD in planned)
    with torch.no_grad():
        logits = model(IDS).logits
        dense, _ = compress.load(tmp_path / "out", dtype=torch.float32, packed=False)
        assert relative_error(dense(IDS).logits, logits) < 1e-5
    if "words" not in case and case != "tied-4":  # which transformers makes no room for
        assert relative_error(logits_of(load_whole(tmp_path / "out"), IDS), logits) < 1e-5


def test_a_tied_table_is_in_the_file_and_in_memory_once(checkpoint, tmp_path):
    recipe = recipe_for(checkpoint("llama", tied=True), **tables(8))
    run(recipe, tmp_path / "out", windows=WINDOWS, self_check=False)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors[f"{TABLE}.weight"].dtype == torch.int8
    assert f"{HEAD}.weight" not in tensors
    assert torch.equal(tensors[f"{HEAD}.weight_scale"], tensors[f"{TABLE}.weight_scale"])
    model, _ = compress.load(tmp_path / "out", packed=True)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert (
        embedding.packed_bytes() == 0 and head.packed_bytes() >= tensors[f"{TABLE}.weight"].nbytes
    )
    model.tie_weights()  # as lm-eval does
    assert model.get_output_embeddings() is head
    dense, _ = compress.load(tmp_path / "out", packed=False)
    assert dense.get_input_embeddings().weight is dense.get_output_embeddings().weight


def test_a_table_is_rounded_to_nearest(checkpoint, tmp_path):
    source = checkpoint("llama")
    run(recipe_for(source, **tables(8)), tmp_path / "out", windows=WINDOWS, self_check=False)
    original = load_file(source / "model.safetensors")[f"{TABLE}.weight"]
    codes = PackedLinears(tmp_path / "out").codes(TABLE)
    levels = codes.codes.float() - 128
    wanted = (original / codes.scale).round().clamp(-128, 127)
    assert torch.equal(levels, wanted)
    plain = original.abs().amax(1, keepdim=True) / 127
    rounded = (original / plain).round() * plain
    assert (levels * codes.scale - original).norm() < (rounded - original).norm()


@pytest.mark.parametrize("symmetric", [True, False])
def test_groups_that_no_kernel_runs_are_loaded_dense(checkpoint, tmp_path, symmetric):
    """Also where transformers alone cannot: an embedding in words, zero points."""
    source, text = checkpoint("llama", dtype=torch.bfloat16), write_text(tmp_path / "text.jsonl")
    sections = tables((4, 4) if symmetric else None, quantize={"symmetric": symmetric})
    sections["quantize"]["group_size"] = 4
    evaluate = {"perplexity": {"dataset": str(text), "length": 24, "tokens": 96}}
    recipe = recipe_for(source, text, **sections, evaluate=evaluate)
    assert any("packed=False" in note for note in plan_of(recipe).notes)
    result = run(recipe, tmp_path / "out", check_source=False)
    assert result.self_check["relative_error"] < 1e-4
    assert result.metrics["conditions"]["linears"] == "dense"
    with refused(UnpackableError, tmp_path / "out", "groups of 4", "packed=False"):
        compress.load(tmp_path / "out", packed=True)
    model, _ = compress.load(tmp_path / "out", packed=False, dtype=torch.float32)
    linears = PackedLinears(tmp_path / "out")
    for name in linears.schemes:
        codes = linears.codes(name)
        found = model.get_submodule(name).weight.detach()
        assert torch.equal(found, dequantize(codes).to(found.dtype))


def test_saving_a_loaded_model_gives_the_same_tensors(checkpoint, tmp_path):
    for tied in (True, False):
        out, again = tmp_path / f"out-{tied}", tmp_path / f"again-{tied}"
        recipe = recipe_for(checkpoint("llama", tied=tied), **tables(8, 8))
        run(recipe, out, windows=WINDOWS, self_check=False)
        model, tokenizer = compress.load(out)
        model.save_pretrained(again)
        tokenizer.save_pretrained(again)
        first, second = (load_file(folder / "model.safetensors") for folder in (out, again))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_embedding_alone(checkpoint, tmp_path):
    recipe = recipe_for(checkpoint("llama"), **tables(8, quantize={"ignore": ["re:.*"]}))
    run(recipe, tmp_path / "out", windows=WINDOWS, self_check=False)
    assert PackedLinears(tmp_path / "out").schemes.keys() == {TABLE}
    packed, _ = compress.load(tmp_path / "out", packed=True)
    assert relative_error(logits_of(packed, IDS), logits_of(tmp_path / "out", IDS)) < 1e-5


def test_the_head_weighs_tokens_as_the_last_layer_does(checkpoint, tmp_path, press):
    source = checkpoint("llama")
    heads = []
    for name in ("uniform", "first_n"):
        quantize = {"token_importance": {"name": name, "minimum": 0.0}}
        folder = press(recipe_for(source, **tables(None, (4, 32), "gptq", quantize=quantize)))
        heads.append(PackedLinears(folder).codes(HEAD).codes)
    assert not torch.equal(*heads)


@pytest.mark.parametrize("stop", ["head", "writing"])
def test_a_run_stopped_behind_its_layers_ends_with_the_same_bytes(
    checkpoint, tmp_path, press, stop
):
    recipe = recipe_for(checkpoint("llama"), **tables(8, (4, 32), method="gptq", **RSQ))
    expected = weight_files(press(recipe))

    class Stop(Watch):
        def stage(self, name):
            if name == stop:
                raise KeyboardInterrupt

    out = tmp_path / "stopped"
    options = {"windows": WINDOWS, "self_check": False}
    with pytest.raises(KeyboardInterrupt):
        run(recipe, out, observer=Stop(), **options)
    run(recipe, out, **options)
    assert weight_files(out) == expected


def test_facts_and_card_name_the_tables(checkpoint, press):
    folder = press(recipe_for(checkpoint("llama", tied=True), **tables(8)))
    facts = json.loads((folder / "modelpress.json").read_text())
    listed = [module["name"] for layer in facts["layers"] for module in layer["modules"]]
    assert TABLE in listed
    card = (folder / "README.md").read_text()
    assert "int8" in card


# ---- other formats ------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_exports_hold_the_same_tables(checkpoint, tmp_path, press, tied):
    source = checkpoint("llama", tied=tied, dtype=torch.float16, vocab_size=288)
    folder = press(recipe_for(source, **tables((8, 32), (8, 32))))
    expected, _ = compress.load(folder, packed=False, dtype=torch.float32)
    logits = logits_of(expected, IDS)  # at its first forward transformers makes weights dense
    export(folder, "gguf", tmp_path / "gguf")
    read = Read(tmp_path / "gguf" / FILE)
    assert read.types["token_embd.weight"] == "Q8_0"
    assert torch.equal(read.values["token_embd.weight"], expected.get_input_embeddings().weight)
    assert ("output.weight" in read.types) != tied
    result = export(folder, "gptq", tmp_path / "gptq")
    assert any(TABLE in note for note in result.notes)
    model, _ = compress.load(tmp_path / "gptq", packed=False, dtype=torch.float32)
    assert relative_error(logits_of(model, IDS), logits) < 2e-3
    assert inspect(tmp_path / "gptq")["bytes"]["total"] == result.bytes["total"]


# ---- refusals -----------------------------------------------------------------------------------


def test_what_a_recipe_may_not_ask(checkpoint):
    source = checkpoint("llama")
    with refused(RecipeError, "quantize.embedding", "none"):
        recipe_for(source, quantize={"method": "none", "embedding": {"bits": 8}})
    with refused(RecipeError, "quantize.head.bits"):
        recipe_for(source, quantize={"head": {"bits": 7}})
    problems = plan_of(recipe_for(source, **tables((8, 128)))).problems
    assert len(problems) == 1 and TABLE in problems[0] and "128" in problems[0]
    quantize = {"overrides": [{"match": "re:.*mlp", "group_size": 48}]}
    for sections, key in (
        (tables((8, 128)), "quantize.embedding.group_size: "),
        (tables(None, (8, 128)), "quantize.head.group_size: "),
        (tables(8, 8, quantize=quantize), "quantize.overrides[0].group_size: "),
    ):
        assert plan_of(recipe_for(source, **sections)).problems[0].startswith(key)
    problems = plan_of(recipe_for(source, **tables(4, format="int-quantized"))).problems
    assert len(problems) == 1 and "save.table_format" in problems[0]


def test_a_head_of_scales_alone_needs_the_embedding_that_it_is(checkpoint, press):
    folder = press(recipe_for(checkpoint("llama", tied=True), **tables(8)))
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {f"{HEAD}.weight_scale": tensors[f"{HEAD}.weight_scale"] * 2}, file)
    with refused(UnpackableError, HEAD, "weight_scale"):
        compress.load(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    save_file(tensors, file)
    with refused(UnpackableError, HEAD, "weight_scale"):
        compress.load(folder)


def test_masked_tokens_do_not_count_for_the_head(checkpoint, press):
    recipe = recipe_for(checkpoint("llama"), **tables(None, (4, 32), method="gptq"))
    ids = random_ids(6, 24)
    other = ids.clone()
    other[:, 12:] = random_ids(6, 12, seed=9)
    codes = []
    for windows in (all_count(ids), all_count(other)):
        windows.mask[:, 12:] = False
        codes.append(PackedLinears(press(recipe, windows)).codes(HEAD).codes)
    assert torch.equal(*codes)
