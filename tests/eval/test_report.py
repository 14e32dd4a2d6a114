import math

import pytest

from compress.errors import UsageError
from compress.eval.report import (
    Row,
    error_plot,
    flatten,
    format_bytes,
    format_number,
    plot_quality,
)
from compress.eval.tables import markdown_table, quality_table
from support.evaluations import EVALUATION
from support.refusals import refused


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


def test_error_plot_is_logarithmic_and_counts_what_it_leaves_out():
    errors = (1e-3, 1e-2, 1e-1, 0.0, None, math.nan)
    plot = error_plot([{"name": f"m.{i}.x", "error": e} for i, e in enumerate(errors)])
    low, middle, high = (point["y"] for point in plot["points"])
    assert low - middle == pytest.approx(middle - high)
    assert low > high  # downwards on the screen
    assert plot["omitted"] == ["m.3.x", "m.4.x", "m.5.x"]
    assert error_plot([{"name": "a", "error": None}]) is None


def test_flatten_spells_keys_as_set_takes_them():
    nested = {"a": {"b": 1, "c": [1, 2]}, "d": [{"e": None}], "f": {}, "g": [], "h": ["x y", "z"]}
    assert list(flatten(nested)) == [
        ("a.b", "1"),
        ("a.c", "[1, 2]"),
        ("d[0].e", "–"),
        ("h", "x y; z"),
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
