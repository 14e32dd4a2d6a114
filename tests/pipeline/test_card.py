"""The card says what the run found, leaves out what is missing, and its front matter is YAML."""

import ast
import re
from itertools import pairwise

import pytest
import yaml

from compress.checkpoint.engines import loading_table
from compress.checkpoint.inspect import inspect
from compress.pipeline.card import bits_summary, model_card

RESULT = {
    "name": "me/tiny-w3",
    "base_model": "maker/tiny",
    "recipe": {
        "rotate": {"kind": "hadamard", "seed": 0},
        "calibration": {"dataset": "wikitext2", "samples": 256, "length": 2048, "seed": 5},
        "quantize": {
            "method": "gptq",
            "bits": 3,
            "symmetric": True,
            "token_importance": {"name": "attention_concentration"},
            "ignore": ["lm_head"],
        },
    },
    "bits": {
        "average": 3.25,
        "symmetric": True,
        "engines": [("vLLM", "with `humming` kernels")],
        "widths": [
            {"bits": 3, "group_size": 128, "modules": 6, "parameters": 3000},
            {"bits": 4, "group_size": 128, "modules": 1, "parameters": 1000},
        ],
    },
    "bytes": {"original": 8_000_000, "quantized": 1_500_000, "other": 500_000, "total": 2_000_000},
    "evaluation": {
        "results": {"demo": {"acc": 0.5, "acc_stderr": 0.02}},
        "perplexity": {"value": 9.31, "value_stderr": 0.2, "line": "perplexity 9.31, no BOS"}
        | {"mean_nll": 2.231, "stderr": 0.02},
        "difference": {
            "results": {"demo": {"acc": {"value": -0.03, "stderr": 0.01}}},
            "mean_nll": {"value": 0.09, "stderr": 0.004},
        },
        "conditions": {"limit": 100},
    },
    "baseline": {
        "results": {"demo": {"acc": 0.53, "acc_stderr": 0.02}},
        "perplexity": {"value": 8.5, "value_stderr": 0.2},
    },
    "provenance": {"versions": {"modelpress": "0.1.0", "torch": "2.13"}, "seed": 0},
}


def front_matter(card: str) -> dict:
    _, text, _ = card.split("---\n", 2)
    return yaml.safe_load(text)


def test_items_that_changed_are_told_where_answers_are_right_or_wrong():
    assert "items that changed" not in model_card(RESULT)
    flips = {"right_to_wrong": 5, "wrong_to_right": 2, "mcnemar_p": 0.4531}
    results = {"demo": {"acc": {"value": -0.03, "stderr": 0.01} | flips}}
    evaluation = RESULT["evaluation"] | {"difference": {"results": results}}
    (row,) = [
        line
        for line in model_card(RESULT | {"evaluation": evaluation}).splitlines()
        if line.startswith("| demo acc")
    ]
    assert row.endswith("| 5 right to wrong, 2 wrong to right (McNemar p 0.4531) |")


def test_front_matter():
    fields = front_matter(model_card(RESULT))
    assert fields["base_model"] == "maker/tiny"
    assert fields["base_model_relation"] == "quantized"
    assert fields["library_name"] == "transformers"
    assert fields["quantized_by"] == "modelpress 0.1.0"
    assert set(fields["tags"]) >= {"modelpress", "compressed-tensors", "3-bit", "4-bit"}


@pytest.mark.parametrize("base", ["/data/models/tiny", "../tiny", "recipes/demo/lm", None])
def test_a_path_is_no_base_model_for_the_hub(base):
    fields = front_matter(model_card(RESULT | {"base_model": base}))
    assert "base_model" not in fields


def test_names_cannot_break_the_front_matter():
    hostile = RESULT | {"provenance": {"versions": {"modelpress": "0.1\n---\nlicense: mit"}}}
    assert "license" not in front_matter(model_card(hostile))


@pytest.mark.parametrize(
    "fact",
    [
        "randomised Hadamard matrix",
        "256 windows of 2048 tokens of wikitext2, seed 5",
        "attention concentration",
        "| 3 | 128 | 6 | 3,000 |",
        "3.25 bits per quantised weight",
        "2.00 MB of weights, 1.50 MB of them quantised; 8.00 MB before",
        "| demo acc | 0.500 ± 0.020 | 0.530 ± 0.020 | -0.030 ± 0.010 |",
        "| perplexity | 9.31 ± 0.20 | 8.50 ± 0.20 | – |",
        "| mean NLL (nats per token) | 2.231 ± 0.020 | – | 0.0900 ± 0.0040 |",
        "perplexity 9.31, no BOS",
        "limit: 100",
        'from_pretrained("me/tiny-w3"',
        "versions.torch: 2.13",
        "humming",
        "method: gptq",
    ],
)
def test_every_fact_is_on_the_card(fact):
    assert fact in model_card(RESULT)


@pytest.mark.parametrize("missing", [*RESULT, "everything"])
def test_missing_pieces_are_left_out(missing):
    result = {"name": "x"} if missing == "everything" else dict(RESULT)
    result.pop(missing if missing != "name" else "bytes", None)
    card = model_card(result)
    assert front_matter(card)["library_name"] == "transformers"
    assert "None" not in card
    assert "{" not in card
    assert ("Not evaluated." in card) == (missing in ("evaluation", "everything"))


def test_the_baseline_inside_the_evaluation_is_found():
    nested = RESULT["evaluation"] | {"baseline": RESULT["baseline"]}
    moved = {key: RESULT[key] for key in RESULT if key != "baseline"} | {"evaluation": nested}
    assert model_card(moved) == model_card(RESULT)


@pytest.mark.parametrize("symmetric", [True, False])
def test_what_loads_where(symmetric):
    module = {"shape": [8, 32], "bits": 4, "group_size": 32, "symmetric": symmetric}
    bits = bits_summary([module | {"name": f"model.layers.{i}.mlp.down_proj"} for i in range(2)])
    card = model_card(RESULT | {"bits": bits})
    assert "| vLLM | yes |" in card
    assert ("dequantize=True" in card) == (not symmetric)


def test_the_summary_counts_every_quantised_weight(mixed):
    modules = inspect(mixed.folder)["modules"]
    summary = bits_summary(modules)
    weights = {name: mixed.twin.get_submodule(name).weight.numel() for name in mixed.modules}
    total = sum(mixed.modules[name].bits * count for name, count in weights.items())
    assert summary["average"] == pytest.approx(total / sum(weights.values()))
    assert sum(row["parameters"] for row in summary["widths"]) == sum(weights.values())
    assert sum(row["modules"] for row in summary["widths"]) == len(weights)
    expected = loading_table(dict(sorted(mixed.modules.items())))  # as inspect lists them
    assert summary["engines"] == expected
    assert summary["symmetric"]
    assert bits_summary([])["average"] is None


def test_a_blank_line_ends_every_table():
    """Markdown takes the line below a table's last row for another row."""
    lines = model_card(RESULT).splitlines()
    for row, below in pairwise(lines):
        if row.startswith("|"):
            assert below.startswith("|") or not below.strip()


# ---- names that are markup ----------------------------------------------------------------------

HOSTILE = [
    'm"); import os; os.system("x', "a\\", "a\nb", "# head", "`code`", "a``b`", "<img src=x>",
    "[text](http://x.y)", "![x](y)", "a|b", "*bold*", "_it_", "$x$", "<!-- x", "&lt;", "```",
    "www.x.y", "a\u202eb", "a\x1b[31mb", "---", "{{ 7 * 7 }}", "'''", "a\u2028b",
]  # fmt: skip


def python_blocks(card: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", card, flags=re.S | re.M)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_stays_text(name):
    recipe = RESULT["recipe"] | {"calibration": {"dataset": name}, "name": name}
    provenance = {"folder": name, name: 1}
    card = model_card(RESULT | {"name": name, "base_model": name, "recipe": recipe,
                                "provenance": provenance})  # fmt: skip
    plain = model_card(RESULT)
    assert front_matter(card)["library_name"] == "transformers"
    # the same headings, code blocks and table rows as for a plain name
    for mark in (r"^## .*$", r"^```python$", r"^\| .* \|$", r"^# "):
        count = [len(re.findall(mark, text, flags=re.M)) for text in (card, plain)]
        assert count[0] == count[1], mark
    seen = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(name.split()))
    for block in python_blocks(card):
        texts = [n.value for n in ast.walk(ast.parse(block)) if isinstance(n, ast.Constant)]
        assert seen in texts
        assert "os" not in [n.id for n in ast.walk(ast.parse(block)) if isinstance(n, ast.Name)]
    prose = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", card, flags=re.S)  # without code
    assert not re.search(r"<(img|!--)|(?<!\\)\]\(http|\x1b|\u202e", prose)


def test_usual_names_are_not_touched():
    card = model_card(RESULT)
    assert "# me/tiny-w3" in card and "`maker/tiny`" in card
    assert 'from_pretrained("me/tiny-w3"' in card
