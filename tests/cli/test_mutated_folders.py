"""Model folders changed at random: refused in a line, or run as plain transformers runs them.

More cases: see `support/mutations.py`.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import compress
from compress.checkpoint.export import export
from compress.pipeline.run import run
from compress.recipe.strategy import PruneStrategy
from compress.storage.safetensors import read_tensors, save_tensors
from support.calling import modelpress
from support.refusals import check_line
from support.tiny_checkpoints import (
    change_config,
    logits_of,
    random_ids,
    recipe_for,
    write_checkpoint,
)
from support.tiny_folders import tiny_folder

pytest.importorskip("hypothesis")
from hypothesis import given
from hypothesis import strategies as st

from support.mutations import cases, damaged, mutate_json, mutated, outcome, same, told

FAMILIES = ("llama-biased", "llama3", "mistral", "qwen2-sliding", "qwen3")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Plain models, one of them in shards, and packed ones."""
    folder = tmp_path_factory.mktemp("folders")
    for family in FAMILIES:
        write_checkpoint(folder / family, family, tied=family == "qwen3")
    tiny_folder(folder / "llava", "llava")
    plain = recipe_for(folder / "llama3", quantize={"method": "none"}, save={"shard_size": "50KB"})
    run(plain, folder / "shards", self_check=False, check_source=False)
    for bits, size in ((4, 32), (8, "channel")):
        recipe = recipe_for(
            folder / "llama-biased", quantize={"method": "rtn", "bits": bits, "group_size": size}
        )
        run(recipe, folder / f"packed-{bits}", self_check=False, check_source=False)
    export(folder / "packed-4", "gptq", folder / "gptq", round_scales=True)
    PruneStrategy(stages=(0, 1), ratios=(0.5, 0.5)).save(folder / "llava" / "pruning.json")
    (folder / "none.yaml").write_text("rotate: hadamard\nquantize: {method: none}\n")
    return folder


def fresh(place: Path, name: str) -> Path:
    shutil.rmtree(place / "case", ignore_errors=True)
    return Path(shutil.copytree(place / name, place / "case"))


def plain_logits(folder: Path) -> torch.Tensor:
    """Of transformers alone, in fp32; tensors that it has no place for are left out there."""
    images = json.loads((folder / "config.json").read_text())["model_type"] == "llava"
    kind = AutoModelForImageTextToText if images else AutoModelForCausalLM
    model, report = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"], report
    return logits(model.eval())


def logits(model: torch.nn.Module) -> torch.Tensor:
    """On the same tokens, as many as the model knows."""
    vocabulary = min(model.config.get_text_config().vocab_size, 99)
    return logits_of(model, random_ids(2, 24, seed=5) % vocabulary)


def check_source(folder: Path) -> None:
    """A folder to start from: refused, or rotated without a change to its logits."""
    planned = told("plan", folder.parent / "none.yaml", "--model", folder)
    told("inspect", folder)
    out = folder.parent / "out"
    shutil.rmtree(out, ignore_errors=True)
    recipe = recipe_for(folder, rotate="hadamard", quantize={"method": "none"})
    refused = outcome(lambda: run(recipe, out, self_check=False, check_source=False))
    if planned is not None:
        assert refused is not None
    loaded = outcome(lambda: compress.load(folder))
    expected = plain_logits(folder) if None in (refused, loaded) else None
    if refused is None:
        assert same(plain_logits(out), expected)
    if loaded is None:
        assert same(logits(compress.load(folder, dtype=torch.float32, prune=False)[0]), expected)


@cases
@given(st.data())
def test_a_mutated_config(offline, place, data):
    folder = fresh(place, data.draw(st.sampled_from([*FAMILIES, "shards", "llava"])))
    files = sorted(file.name for file in folder.glob("*.json"))
    name = data.draw(st.sampled_from(["config.json", "config.json", *files]))
    mutate_json(folder / name, data)
    check_source(folder)


def mutate_header(file: Path, data) -> None:
    """Changes the header of a safetensors file, or any of its bytes."""
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    kind = data.draw(st.sampled_from(["values", "values", "values", "header", "bytes", "length"]))
    if kind == "values":
        header = json.dumps(mutated(json.loads(content[8 : 8 + size]), data)).encode()
        content = len(header).to_bytes(8, "little") + header + content[8 + size :]
    elif kind == "header":
        header = damaged(content[8 : 8 + size], data)
        content = len(header).to_bytes(8, "little") + header + content[8 + size :]
    elif kind == "length":
        content = damaged(content[:8], data) + content[8:]
    else:
        content = damaged(content, data)
    file.write_bytes(content)


@cases
@given(st.data())
def test_a_mutated_header(offline, place, data):
    folder = fresh(place, data.draw(st.sampled_from([*FAMILIES, "shards"])))
    file = data.draw(st.sampled_from(sorted(folder.glob("*.safetensors*"))))
    if file.suffix == ".json":
        mutate_json(file, data)
    else:
        mutate_header(file, data)
    check_source(folder)


def mutate_tensors(folder: Path, data) -> None:
    """Changes what one tensor of a packed linear holds, or its type or shape."""
    (file,) = folder.glob("*.safetensors")
    tensors = read_tensors(file)
    name = data.draw(st.sampled_from([n for n in tensors if "proj" in n]))
    tensor = tensors[name]
    kind = data.draw(st.sampled_from(["number", "dtype", "shape", "drop", "name", "move"]))
    if kind == "number":
        if tensor.is_floating_point():
            values = [float("nan"), float("inf"), -1.0, 0.0, 1e-30, 1e30]
        else:
            values = [-1, 0, 1, 2**31 - 1, -(2**31)]
        value = data.draw(st.sampled_from(values))
        flat = tensor.view(-1)
        flat[data.draw(st.integers(0, len(flat) - 1))] = value
    elif kind == "dtype":
        new = data.draw(
            st.sampled_from([torch.int64, torch.int8, torch.float16, torch.float64, torch.bool])
        )
        tensors[name] = tensor.to(new)
    elif kind == "shape":
        shapes = [
            tensor.T.contiguous() if tensor.ndim == 2 else tensor[None],
            tensor[:-1],
            tensor[..., :-1],
            tensor[None],
        ]
        tensors[name] = data.draw(st.sampled_from(range(4)).map(shapes.__getitem__)).contiguous()
    elif kind == "drop":
        del tensors[name]
    elif kind == "name":
        tensors[name + data.draw(st.sampled_from(["x", "_zero_point", ".weight"]))] = tensors.pop(
            name
        )
    else:
        other = data.draw(st.sampled_from([n for n in tensors if "proj" in n]))
        tensors[name], tensors[other] = tensors[other], tensors[name]
    save_tensors(file, tensors)


@cases
@given(st.data())
def test_a_mutated_packed_folder(offline, place, data):
    base = data.draw(st.sampled_from(["packed-4", "packed-4", "packed-8", "gptq"]))
    folder = fresh(place, base)
    kind = data.draw(
        st.sampled_from(["section", "section", "tensors", "tensors", "header", "json"])
    )
    if kind == "section":
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = mutated(config["quantization_config"], data)
        (folder / "config.json").write_text(json.dumps(config))
    elif kind == "tensors":
        mutate_tensors(folder, data)
    elif kind == "header":
        mutate_header(data.draw(st.sampled_from(sorted(folder.glob("*.safetensors")))), data)
    else:
        mutate_json(data.draw(st.sampled_from(sorted(folder.glob("*.json")))), data)
    told("inspect", folder)
    for format in ("gptq", "gguf"):
        shutil.rmtree(place / "out", ignore_errors=True)
        told("export", folder, "--format", format, "--output", place / "out", "--round-scales")
    packed = outcome(lambda: compress.load(folder, packed=True))
    dense = outcome(lambda: compress.load(folder, packed=False))
    outcome(lambda: compress.load(folder))
    if packed is None and dense is None:
        ours = [
            logits(compress.load(folder, dtype=torch.float32, packed=p)[0]) for p in (True, False)
        ]
        assert same(*ours)
    if base == "gptq" or packed is not None:
        return
    found = logits(compress.load(folder, dtype=torch.float32, packed=True)[0])
    try:
        expected = plain_logits(folder)
    except Exception:  # it makes do with random weights, or knows fewer words for the same
        return
    assert same(found, expected)


@pytest.mark.parametrize("kind", ["recipe", "header", "packed"])
def test_one_of_each_in_a_process_of_its_own(place, kind):
    folder = fresh(place, "packed-4" if kind == "packed" else "llama3")
    recipe = place / "wrong.yaml"
    recipe.write_text(f"quantize: {{bits: {4 if kind != 'recipe' else 'four'}}}")
    if kind == "packed":
        change_config(folder, quantization_config={"quant_method": "gptq", "bits": [4]})
    if kind == "header":
        (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    command = ["inspect", folder] if kind == "packed" else ["plan", recipe, "--model", folder]
    done = modelpress(*command)
    (line,) = done.stderr.splitlines()
    assert done.returncode in (1, 2) and done.stdout == "" and line.startswith("error: ")
    check_line(line, "model.safetensors" if kind == "header" else "bits")
