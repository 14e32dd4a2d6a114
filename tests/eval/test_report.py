import math
from xml.etree import ElementTree

import pytest

from compress.errors import UsageError
from compress.eval.report import (
    Row,
    error_plot,
    flatten,
    format_bytes,
    format_number,
    markdown_table,
    plot_quality,
    quality_table,
    write_report,
)
from support.refusals import refused

EVALUATION = {
    "results": {"demo_code": {"acc": 0.525, "acc_stderr": 0.0251}},
    "perplexity": {
        "value": 9.3172,
        "value_stderr": 0.213,
        "mean_nll": 2.2319,
        "stderr": 0.0229,
        "line": "perplexity 9.3172 with 512 tokens",
    },
    "kl": {"mean": 0.0831, "stderr": 0.0012, "line": "KL 0.0831"},
    "baseline": {
        "results": {"demo_code": {"acc": 0.6, "acc_stderr": 0.0245}},
        "perplexity": {"value": 8.75, "value_stderr": 0.2, "mean_nll": 2.169, "stderr": 0.0228},
    },
    "difference": {
        "results": {"demo_code": {"acc": {"value": -0.075, "stderr": 0.012, "count": 400}}},
        "mean_nll": {"value": 0.0629, "stderr": 0.0031, "count": 90},
    },
    "conditions": {"limit": None, "samples": {"demo_code": 400}},
}
LAYERS = [
    {
        "name": f"model.layers.{i}.{part}",
        "bits": bits,
        "group_size": 64,
        "error": 0.001 * (i + 1) * bits,
        "effective_sample_size": 812.5,
        "seconds": 0.25,
    }
    for i in range(20)
    for part, bits in (("self_attn.q_proj", 3), ("mlp.down_proj", 4))
]


def test_numbers_show_as_many_digits_as_their_error_has():
    assert format_number(9.3172, 0.213) == "9.32 ± 0.21"
    assert format_number(0.525, 0.0251) == "0.525 ± 0.025"
    assert format_number(1234.5, 98.0) == "1234 ± 98"
    assert format_number(0.123456) == "0.1235"
    assert format_number(None) == "–"
    assert format_number(math.inf, math.inf) == "inf"
    assert [format_bytes(n) for n in (999, 1_900_000, 5.4e9)] == ["999 B", "1.90 MB", "5.40 GB"]


def test_rows_and_tables():
    rows = [
        Row.of("16 bit", EVALUATION["baseline"], bytes=6_100_000),
        Row.of("RSQ | 3 bit", EVALUATION, bytes=1_900_000, bits=3.25),
    ]
    text = markdown_table(rows, "held-out modules, 512 tokens")
    header, rule, first, second, *rest = text.splitlines()
    assert header.count("|") == rule.count("|") == first.count("|") == 7
    assert "_stderr" not in header
    assert "6.10 MB" in first
    assert "8.75 ± 0.20" in first
    assert "RSQ \\| 3 bit" in second
    assert "0.525 ± 0.025" in second
    assert "held-out modules, 512 tokens" in rest
    table = quality_table(rows)
    assert (table.row_count, len(table.columns)) == (2, 6)


def test_a_row_is_flat_in_json_with_errors_behind_their_figures():
    row = Row.of("RSQ", EVALUATION, bytes=1_900_000, bits=3.25)
    assert list(row.as_dict().items()) == [
        ("name", "RSQ"),
        ("bytes", 1_900_000),
        ("bits", 3.25),
        ("perplexity", 9.3172),
        ("perplexity_stderr", 0.213),
        ("kl", 0.0831),
        ("kl_stderr", 0.0012),
        ("demo_code acc", 0.525),
        ("demo_code acc_stderr", 0.0251),
    ]


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
        "quantize.overrides[0].match",
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
    assert not any(link in page for link in ("http:", "https:", "src=", "<script", "<link"))
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
    assert "2 of 5 linears were rounded to nearest" in path.read_text()


def test_error_plot_is_logarithmic_and_counts_what_it_leaves_out():
    errors = (1e-3, 1e-2, 1e-1, 0.0, None, math.nan)
    plot = error_plot([{"name": f"m.{i}.x", "error": e} for i, e in enumerate(errors)])
    low, middle, high = (point["y"] for point in plot["points"])
    assert low - middle == pytest.approx(middle - high)
    assert low > high  # downwards on the screen
    assert plot["omitted"] == 3
    assert error_plot([{"name": "a", "error": None}]) is None


def test_flatten_spells_keys_as_set_takes_them():
    nested = {"a": {"b": 1, "c": [1, 2]}, "d": [{"e": None}], "f": {}}
    assert list(flatten(nested)) == [
        ("a.b", "1"),
        ("a.c", "[1, 2]"),
        ("d[0].e", "–"),
        ("f", "{}"),
    ]


def test_picture(tmp_path):
    rows = [
        Row.of("16 bit", EVALUATION["baseline"], bytes=6_100_000),
        Row.of("RSQ 3 bit", EVALUATION, bytes=1_900_000),
        Row("without size", {"perplexity": 12.0}),
    ]
    path = plot_quality(rows, tmp_path / "quality.svg")
    picture = path.read_text(encoding="utf-8")
    for text in ("RSQ 3 bit", "16 bit", "perplexity", "demo_code acc"):
        assert f"<!-- {text}" in picture  # as matplotlib notes the text of its glyphs
    assert "without size" not in picture
    png = plot_quality(rows, tmp_path / "quality.png", metrics=["kl"]).read_bytes()
    assert png.startswith(b"\x89PNG")
    with refused(UsageError, "bytes", "perplexity"):
        plot_quality([Row("a", {"bytes": 1})], tmp_path / "none.png")
