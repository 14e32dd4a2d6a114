"""Engines that will not load a checkpoint are named, and told apart by what they go by."""

import json
import re
from itertools import combinations, dropwhile, takewhile
from pathlib import Path

import pytest

from compress.checkpoint.compressed_tensors import quantization_config
from compress.checkpoint.engines import (
    EVIDENCE,
    UNLIKE_IN_16_BITS,
    evidence,
    gguf_table,
    gptq_notes,
    gptq_table,
    loading_table,
    must_dequantize_on_load,
    plan_notes,
    split_fusions,
)
from compress.errors import CheckpointError
from compress.pipeline.card import bits_summary
from compress.scheme import Scheme
from support.refusals import check_line, refused
from support.tiny_quantised import MIXED

A, B, C = Scheme(4, 128), Scheme(2, 64), Scheme(8, None)
INNER = [f"self_attn.{part}_proj" for part in "qkvo"]
INNER += [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
UNIFORM = {f"model.layers.{i}.{name}": A for i in range(2) for name in INNER}
TORN = UNIFORM | {"model.layers.1.self_attn.k_proj": C}
QKV = tuple(f"model.layers.1.self_attn.{part}_proj" for part in "qkv")


def test_fusions_whose_parts_differ():
    assert split_fusions(UNIFORM) == {}
    assert split_fusions(TORN) == {"model.layers.1.self_attn.qkv_proj": QKV}
    left = UNIFORM | {"model.layers.0.mlp.up_proj": None}
    assert [*split_fusions(left)] == ["model.layers.0.mlp.gate_up_proj"]
    numbered = {"model.layers.0.feed_forward.w1": A, "model.layers.0.feed_forward.w3": C}
    assert [*split_fusions(numbered)] == ["model.layers.0.feed_forward.w13"]


def test_readers_that_will_not_load_it_are_named():
    assert gptq_notes(UNIFORM) == []
    mixed = UNIFORM | {"model.layers.1.mlp.down_proj": C}
    assert [note.split()[0] for note in gptq_notes(mixed)] == ["transformers"]
    narrow = dict.fromkeys(UNIFORM, B)
    assert [note.split()[0] for note in gptq_notes(narrow)] == ["vLLM"]
    assert "model.layers.1.self_attn.qkv_proj" in gptq_notes(TORN)[0]
    assert "lm_head" in gptq_notes(UNIFORM | {"lm_head": A})[0]


def test_what_a_plan_says_of_engines():
    assert plan_notes(UNIFORM | {"lm_head": None}) == []
    fused = plan_notes(TORN)
    assert [engine in note for note, engine in zip(fused, ("vLLM", "SGLang"), strict=True)]
    assert all(part in note for part in QKV for note in fused)
    for note, engine in zip(plan_notes(dict.fromkeys(UNIFORM, B)), ("vLLM", "SGLang"), strict=True):
        check_line(note, "2 bits", engine)
    asymmetric = dict.fromkeys(UNIFORM, Scheme(4, 32, symmetric=False))
    (dequantized,) = plan_notes(asymmetric)
    check_line(dequantized, "transformers", "dequantize=True")
    (mixed,) = plan_notes(asymmetric | {"model.layers.1.mlp.down_proj": A})
    check_line(mixed, "transformers", "several widths")


def hardness(how: str) -> int:
    """How a cell begins: with yes, with what else is needed, or with no."""
    return ("yes", "with", "no").index(how.split()[0].strip(",:"))


def test_several_schemes_load_where_each_of_them_does():
    pool = [Scheme(b, g, s) for b in (2, 4, 8) for g in (None, 64, 256) for s in (True, False)]
    for pair in combinations(pool, 2):
        together = dict(loading_table(dict(zip(("o_proj", "down_proj"), pair, strict=True))))
        alone = [dict(loading_table({"o_proj": scheme})) for scheme in pair]
        for engine in ("vLLM", "SGLang"):
            assert hardness(together[engine]) == max(hardness(one[engine]) for one in alone)


def readme_rows() -> dict[str, list[str]]:
    """The rows of README's table of what loads where, by what they are about."""
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    lines = text.split("## What loads where")[1].split("\n## ")[0].splitlines()
    table = list(takewhile(bool, dropwhile(lambda line: not line.startswith("|"), lines)))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert [cell.split()[0] for cell in rows[0][1:]] == [
        "transformers",
        "lm-eval",
        "vLLM",
        "SGLang",
    ]
    return {row[0]: row[1:] for row in rows[2:]}


def schemes_of(label: str) -> list[list[Scheme]]:
    """The schemes of checkpoints that a row speaks of: a list a width."""
    if "bits" not in label or "none" in label:
        return [[]]
    widths, kind = label.split(" bits", 1)
    size = re.search(r"groups of (\d+)", kind)
    sizes = [int(size[1])] if size else [None, 32, 128]
    symmetric = "asymmetric" not in kind
    grid = {
        int(b): [Scheme(int(b), g, symmetric) for g in sizes] for b in re.findall(r"\d", widths)
    }
    if "several" in kind:
        return [*grid.values()]
    return [[scheme] for same in grid.values() for scheme in same]


@pytest.mark.parametrize("label", readme_rows())
def test_readme_says_what_the_table_says(label):
    transformers, lm_eval, vllm, sglang = readme_rows()[label]
    for schemes in schemes_of(label):
        rows = loading_table({f"layers.{i}.o_proj": scheme for i, scheme in enumerate(schemes)})
        expected = [hardness(how) for _, how in rows]
        assert [hardness(cell) for cell in (transformers, vllm, sglang)] == expected
        assert (lm_eval == "yes") == (expected[0] == 0)


def test_what_transformers_cannot_load_is_said():
    symmetric = quantization_config(dict(zip("abcde", MIXED, strict=True)), [])
    assert not must_dequantize_on_load(symmetric)
    mixture = {"a": Scheme(3, 32, False), "b": Scheme(4, 32, False)}
    with refused(CheckpointError, "vLLM"):
        must_dequantize_on_load(quantization_config(mixture, []))


def test_group_sizes_that_engines_do_not_run():
    assert plan_notes({"a": A, "b": Scheme(4, 64), "c": C}) == []
    for bits in (4, 8):
        vllm, sglang = plan_notes(dict.fromkeys(UNIFORM, Scheme(bits, 512)))
        check_line(vllm, 512, "vLLM", "float16")
        check_line(sglang, 512, "SGLang")
    *_, here = plan_notes({"a": Scheme(4, 36)})
    check_line(here, "packed=False", 8)
    assert gptq_notes(dict.fromkeys(UNIFORM, Scheme(4, 512))) == []
    (note,) = gptq_notes(dict.fromkeys(UNIFORM, Scheme(4, 192)))
    check_line(note, "GPTQModel", 192)
    loads = dict(loading_table({"a": Scheme(4, 16, symmetric=False)}))
    assert "humming" in loads["vLLM"] and loads["SGLang"].startswith("no")


# What engines made of checkpoints of ours, as tests/interop/engines/record.py has written it down.
RECORDED = json.loads(
    (Path(__file__).parents[1] / "interop" / "engines" / "results.json").read_text("utf-8")
)


def claim(row) -> str:
    """What the card of such a checkpoint says of the row's engine."""
    rows = bits_summary(row["modules"], row["format"], row["kind"])["engines"]
    name = row["engine"].partition(",")[0]
    return next(how for engine, how in rows if engine.partition(",")[0] == name)


def is_the_same_model(row) -> bool:
    """Whether an answer is ours but for what an engine rounds on its way, such as activations."""
    theirs, ours = row["perplexity"]
    return abs(theirs / ours - 1) < 0.02 and row["top1"] > 0.9


@pytest.mark.parametrize(
    "row",
    [pytest.param(row, id=f"{row['engine']}-{row['checkpoint']}") for row in RECORDED],
)
def test_the_table_says_what_engines_did(row):
    if row["format"] == "unquantised":
        unlike = UNLIKE_IN_16_BITS.get(row["engine"].partition(",")[0], ())
        assert is_the_same_model(row) == (row["kind"] not in unlike)
        return
    how = claim(row)
    if "refused" in row:
        # Of vLLM a CPU was asked: what it refused may be for GPUs.
        assert how.startswith("no") or (row["engine"] == "vLLM" and re.search("GPU|humming", how))
    else:
        assert how.startswith("no") != is_the_same_model(row)


@pytest.mark.parametrize("engine", EVIDENCE)
def test_what_is_said_to_have_run_is_recorded(engine):
    rows = [row for row in RECORDED if row["engine"].partition(",")[0] == engine]
    said = re.match(r"run: (\S+) ([\d.]+) on a CPU", evidence(engine))
    assert bool(said) == any("perplexity" in row for row in rows)
    for row in rows:
        assert said and row["versions"][said[1].lower()].startswith(f"{said[2]}.")


def test_every_engine_of_a_table_has_its_evidence():
    tables = [loading_table(UNIFORM), gptq_table(UNIFORM), gguf_table([A])]
    assert all(evidence(engine) for table in tables for engine, _ in table)


def test_what_runs_on_gpus_alone_is_said():
    def vllm(schemes, **more):
        return dict(loading_table(schemes, **more))["vLLM"]

    assert vllm(UNIFORM) == "yes" == dict(gptq_table(UNIFORM))["vLLM"]
    head = {"lm_head": C}
    for schemes, tables in (
        (dict.fromkeys(UNIFORM, C), None),
        (UNIFORM | head, {"lm_head": "pack-quantized"}),
        (UNIFORM | {"model.embed_tokens": C}, {"model.embed_tokens": "pack-quantized"}),
        ({"model.layers.0.mlp.experts.3.up_proj": A}, None),
    ):
        check_line(vllm(schemes, tables=tables), "yes, on GPUs")
    check_line(dict(gptq_table(UNIFORM | head))["vLLM"], "yes, on GPUs")
    small = dict.fromkeys(UNIFORM, Scheme(4, 16))
    check_line(vllm(small), "float16", "CPU")  # which a GPU does in fp16 alone
    check_line(vllm(dict.fromkeys(UNIFORM, Scheme(4, 16, symmetric=False))), "humming", "CPU")
