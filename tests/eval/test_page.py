"""Pages: what they hold, and that a browser shows them whole, on a phone and at night."""

import math
from xml.etree import ElementTree

import pytest

from compress.eval.page import write_comparison, write_report
from compress.eval.report import FRONT_LINE, Row, marked
from compress.eval.tables import markdown_table
from support.browser import CHROMIUM, opened
from support.evaluations import EVALUATION, LAYERS


def test_page_holds_what_it_was_given(tmp_path):
    path = write_report(
        tmp_path / "new" / "report.html",
        {
            "name": "demo <lm>",
            "recipe": {"quantize": {"bits": 3, "overrides": [{"match": "re:.*down_proj$"}]}},
            "provenance": {"seed": 7},
            "layers": LAYERS,
            "evaluation": EVALUATION,
            "bytes": {"original": 6_000_000, "total": 2_000_000},
        },
    )
    page = path.read_text(encoding="utf-8")
    for part in (
        "demo &lt;lm&gt;",
        "re:.*down_proj$",
        "9.32 ± 0.21",
        "8.75 ± 0.20",
        "-0.075 ± 0.012",
        "0.0629 ± 0.0031",
        "perplexity 9.3172 with 512 tokens",
        "samples.demo_code",
        "812.5",
        "3.00 x",
        "model.layers.19.mlp.down_proj: 0.08",
    ):
        assert part in page, part
    assert "<lm>" not in page
    assert not any(link in page for link in ("http:", "https:", "src=", "<link", "@import"))
    drawing = page[page.index("<svg") : page.index("</svg>") + len("</svg>")]
    circles = [e for e in ElementTree.fromstring(drawing).iter() if e.tag == "circle"]  # noqa: S314
    assert len(circles) == len(LAYERS) + 2  # and two widths in the legend


@pytest.mark.parametrize(
    "result",
    [
        {},
        {"name": "x", "layers": None, "evaluation": None, "bytes": None, "recipe": None},
        {"layers": [{"name": "a.0.b"}, {"name": "a.1.b", "error": None, "extra": 5}]},
        {"layers": [{"name": "a.0.b", "error": 0.5}], "evaluation": {"results": {}}},
        {"evaluation": {"perplexity": {"value": 5.0}}},
        {"evaluation": EVALUATION, "baseline": {"results": {}}},
    ],
)
def test_missing_pieces_leave_a_page(tmp_path, result):
    page = write_report(tmp_path / "report.html", result).read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert page.rstrip().endswith("</html>")
    assert "Undefined" not in page


def test_linears_that_were_rounded_to_nearest_are_counted(tmp_path):
    layers = [{"name": f"a.{i}.b", "error": 0.1} for i in range(5)]
    path = write_report(tmp_path / "plain.html", {"layers": layers})
    assert "rounded to nearest" not in path.read_text()
    for layer in layers[:2]:
        layer["rounded_to_nearest"] = True
    path = write_report(tmp_path / "page.html", {"layers": layers})
    assert "2 of 5 matrices were rounded to nearest" in path.read_text()


# ---- the verdict ---------------------------------------------------------------------------------


def page_of(tmp_path, **facts) -> str:
    return write_report(tmp_path / "page.html", {"name": "x", **facts}).read_text()


def test_the_verdict_has_size_and_cost_with_its_interval(tmp_path):
    sizes = {"original": 6_000_000, "total": 2_000_000}
    page = page_of(tmp_path, evaluation=EVALUATION, bytes=sizes, bits={"average": 3.25})
    assert "3.00 times smaller, at 3.25 bits a weight" in page
    low, middle, high = (100 * math.expm1(0.0629 + side * 1.96 * 0.0031) for side in (-1, 0, 1))
    assert f"{middle:+.1f} %" in page
    assert f"{low:+.1f} to {high:+.1f} %" in page
    assert "was not measured" in page_of(tmp_path, bytes=sizes)


def judged_page(tmp_path, **estimate):
    flips = {"right_to_wrong": 12, "wrong_to_right": 3, "mcnemar_p": 0.03516} | estimate
    difference = {"results": {"demo_code": {"acc": {"count": 400} | flips}}}
    return page_of(tmp_path, evaluation=EVALUATION | {"difference": difference})


def test_a_verdict_on_a_task_stands_beside_its_interval(tmp_path):
    page = judged_page(tmp_path, value=-0.01, stderr=0.01)
    assert "no significant loss, 95 % interval -0.030 to +0.010" in page
    for cell in ("12 / 3", "0.03516"):
        assert f'<td class="n">{cell}</td>' in page
    page = judged_page(tmp_path, value=-0.05, stderr=0.01)
    assert ": significant loss, 95 % interval -0.070 to -0.030" in page
    assert "significant" not in judged_page(tmp_path, value=-0.05, stderr=None)
    same = {"value": 0, "stderr": 0, "right_to_wrong": 0, "wrong_to_right": 0}
    page = judged_page(tmp_path, **same)
    assert "no item changed" in page and "significant" not in page


def test_warnings_and_engines_are_on_the_first_screen(tmp_path):
    engines = [("vLLM", "with `humming` kernels"), ("SGLang", "no: 3 bits")]
    warnings = {"warnings": ["something odd", "loading in vLLM: no"]}
    page = page_of(tmp_path, bits={"engines": engines}, provenance=warnings, layers=LAYERS)
    first = page[: page.index("<h2>")]
    for part in ("something odd", 'class="with">with `humming`', 'class="no">no: 3 bits'):
        assert part in first


def test_bytes_of_layers_are_stacked_by_width(tmp_path):
    module = {"shape": [8, 64], "group_size": 32, "symmetric": True}
    modules = [
        module | {"name": "model.layers.0.a", "bits": 4},
        module | {"name": "model.layers.0.b", "bits": 2},
        module | {"name": "model.layers.1.a", "bits": 2},
        {"name": "lm_head", "shape": [9, 64], "bits": 16, "group_size": None, "symmetric": None},
    ]
    page = page_of(tmp_path, modules=modules)
    # 512 weights of 4.5 and of 2.5 bits
    assert "layer 0: 448 B" in page and "layer 1: 160 B" in page
    assert f"height:{100 * 160 / 448:.2f}%" in page
    assert "4 bits" in page and "16 bits" not in page


def test_earlier_evaluations_have_tables_of_their_own(tmp_path):
    earlier = [{"results": {"piqa": {"acc": 0.125}}, "conditions": {"limit": 3}}]
    page = page_of(tmp_path, evaluation=EVALUATION, earlier=earlier)
    assert page.rindex("demo_code acc") < page.index("Measured earlier") < page.rindex("0.125")


def tiles(page: str) -> str:
    return page[page.index('<div class="cards">') : page.index("</header>")]


def test_tiles_have_the_newest_of_each_kind(tmp_path):
    newer = {"results": {"piqa": {"acc": 0.75}, "demo_code": {"acc": 0.5}}}
    shown = tiles(page_of(tmp_path, evaluation=newer, earlier=[EVALUATION]))
    for figure in ("9.317", "8.75 in 16 bits", "0.0831", "piqa acc", "0.75", "0.5<"):
        assert figure in shown
    assert shown.count("demo_code acc") == 1 and "0.525" not in shown
    assert "perplexity +6.5 %" in page_of(
        tmp_path, evaluation=newer, earlier=[EVALUATION], bytes={"original": 4, "total": 2}
    )


def test_headings_say_how_evaluations_of_one_task_differ(tmp_path):
    results = {"results": {"demo_code": {"acc": 0.5}}}
    asked = {"system_instruction": "Be brief.", "shots": {"demo_code": 5}, "limit": 50}
    chat = results | {"conditions": {"chat_template": True} | asked}
    plain = results | {"conditions": {"chat_template": False, "warnings": {}, "limit": None}}
    page = page_of(tmp_path, evaluation=chat, earlier=[plain])
    assert "<h3>with chat template, system prompt “Be brief.”, 5 shots, limit 50</h3>" in page
    assert "<h3>without chat template</h3>" in page
    assert "{}" not in page


def test_warnings_of_lm_eval_are_sentences(tmp_path):
    said = {"conditions": {"limit": 3, "warnings": {"cut to 64 tokens": 2, "odd": 1}}}
    page = page_of(tmp_path, evaluation={"results": {"a": {"acc": 1.0}}} | said)
    assert "cut to 64 tokens (2 times)" in page and "warnings." not in page


def test_figures_of_before_an_export_are_told_as_such(tmp_path):
    inherited = EVALUATION | {"before_export": "compressed-tensors"}
    differs = {"differs": ["model.embed_tokens was rounded to Q8_0"]}
    page = page_of(tmp_path, evaluation=inherited, export=differs)
    assert '<th class="n">before export</th>' in page and "this model</th>" not in page
    assert "compressed-tensors checkpoint" in page and differs["differs"][0] in page
    assert "before export" not in page_of(tmp_path, evaluation=EVALUATION, export=differs)


def test_what_is_not_drawn_is_named(tmp_path):
    table = {"name": "model.embed_tokens", "bits": 8, "error": None}
    page = page_of(tmp_path, layers=[*LAYERS, table])
    assert "is known of it: model.embed_tokens." in page
    page = page_of(tmp_path, layers=[*LAYERS, *({"name": f"m.{i}.x"} for i in range(7))])
    assert "is known of them: m.0.x, m.1.x, m.2.x, m.3.x, m.4.x and 2 more." in page
    assert "is known of" not in page_of(tmp_path, layers=LAYERS)


SAMPLE = {"tokens": ["if", "\n\n", "<b>", " end"], "weights": {0: [0.5, 9.0, 2.0, 1.0]}}


def test_tokens_are_shaded_by_their_weights(tmp_path):
    page = page_of(tmp_path, layers=LAYERS, token_sample=SAMPLE)
    assert '<span style="--w:0.12" title="0.5">if</span>' in page
    assert '<span style="--w:1.00" title="9">↵↵\n</span>' in page  # four times the mean and more
    assert '<span style="--w:0.50" title="2">&lt;b&gt;</span>' in page
    assert "layer 0, weights up to 9" in page
    for nothing in ({"tokens": [], "weights": {0: [1.0]}}, {"tokens": ["if"], "weights": {}}):
        assert "Tokens that matter" not in page_of(tmp_path, layers=LAYERS, token_sample=nothing)


# ---- comparisons ---------------------------------------------------------------------------------

ROWS = [
    Row("16-bit", {"bytes": 100, "perplexity": 10.0}),
    Row("large", {"bytes": 60, "perplexity": 10.5, "kl": 0.1}),
    Row("dominated <em>", {"bytes": 60, "perplexity": 10.9, "kl": 0.2}),
    Row("small", {"bytes": 30, "perplexity": 12.0, "kl": 0.4}),
]
COMPARED = {
    "title": "a comparison",
    "rows": marked(ROWS),
    "conditions": f"on a text; {FRONT_LINE}",
    "differences": [
        {"name": "small", "of": "kl", "value": 0.3, "stderr": 0.05},
        {
            "name": "small",
            "of": "demo_code acc",
            "value": -0.02,
            "stderr": 0.01,
            "right_to_wrong": 17,
            "wrong_to_right": 9,
            "mcnemar_p": 0.1686,
        },
    ],
    "pairing": "minus large",
    "runs": [{"name": "small", "seed": 0, "bits": 2, "bytes": 30, "seconds": 1.5}],
}


def front(rows):
    return {row.name for row in marked(rows) if row.front}


def test_the_front_is_what_no_other_beats():
    assert front(ROWS) == {"large", "small"}
    assert front([Row("a", {"bytes": 5}), Row("b", {"bytes": 4})]) == set()
    twins = [Row(name, {"bytes": 5, "kl": 0.5}) for name in "ab"]
    assert front(twins) == {"a", "b"}
    without_kl = [Row(row.name, {k: v for k, v in row.values.items() if k != "kl"}) for row in ROWS]
    assert front(without_kl) == {"large", "small"}  # the 16-bit model is none of the recipes


def test_the_front_is_marked_in_tables_and_told_in_json():
    rows = marked(ROWS)
    assert [row.as_dict().get("pareto_front") for row in rows] == [None, True, False, True]
    names = [line.split(" | ")[0] for line in markdown_table(rows, "").splitlines()[2:6]]
    assert [name.endswith("◆") for name in names] == [False, True, False, True]


def test_a_comparison_has_its_rows_and_marks_the_front(tmp_path):
    page = write_comparison(tmp_path / "c.html", COMPARED).read_text()
    assert page.count("◆</span>") == 2
    assert "dominated &lt;em&gt;" in page and "<em>" not in page
    assert '<td class="n">+0.300 ± 0.050</td>' in page
    assert "from 0.202 to 0.398" in page
    assert "Nearest to 16 bits: large" in page
    row = page[page.index("<td>demo_code acc</td>") :]
    for cell in ("-0.020 ± 0.010", "17 / 9", "0.1686"):
        assert f'<td class="n">{cell}</td>' in row


# ---- in a browser --------------------------------------------------------------------------------

WIDTHS, SCHEMES = (360, 1280), ("light", "dark")


def long_page(tmp_path, kind):
    """A page whose names and texts are longer than a phone is wide."""
    if kind == "comparison":
        return write_comparison(tmp_path / "page.html", COMPARED | {"title": "recipe-" * 40})
    module = {"shape": [64, 64], "group_size": 64, "symmetric": True}
    facts = {
        "name": "a-long-name-of-a-model-" * 4,
        "layers": LAYERS,
        "modules": [module | {"name": row["name"], "bits": row["bits"]} for row in LAYERS],
        "evaluation": EVALUATION,
        "recipe": {"quantize": {"bits": 3, "ignore": ["x" * 300]}},
        "provenance": {"warnings": ["w" * 200], "hash": "f" * 64},
        "bits": {"average": 3.5, "engines": [("vLLM", "yes")]},
        "bytes": {"original": 6_000_000, "total": 2_000_000},
        "token_sample": SAMPLE | {"tokens": ["x" * 90, "\n\n", "<b>", " end"]},
    }
    return write_report(tmp_path / "page.html", facts)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("kind", ["run", "comparison"])
def test_a_browser_shows_it_whole(tmp_path, kind):
    """No message, no request, nothing cut off, no text under 11 px, and something to see."""
    page = long_page(tmp_path, kind)
    for width, scheme, seen in opened(page, WIDTHS, SCHEMES):
        assert seen.messages == [], (width, scheme)
        assert seen.requests == [page.as_uri()]
        assert seen.scroll_width <= width
        assert seen.smallest_text >= 11
        assert seen.colours > 8
        assert (sum(seen.background) < 3 * 128) == (scheme == "dark")
