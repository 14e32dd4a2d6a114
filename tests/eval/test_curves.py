"""The plot of accuracy against kept tokens: what is in it, and what cannot be drawn."""

import pytest

from compress.errors import UsageError
from compress.eval.curves import plot_kept

METRIC = "demo_vqa exact_match"


def row(kept, value, **more):
    return {"name": f"x keep={kept}", "kept": kept, METRIC: value, METRIC + "_stderr": 0.01} | more


BASELINE = {"name": "16-bit", "kept": 1.0, METRIC: 0.96, METRIC + "_stderr": 0.005}


def test_every_method_has_a_line_and_every_budget_a_tick(tmp_path):
    lines = {
        "random": [row(0.5, 0.8), row(0.1, 0.3)],
        "FastV": [row(0.5, 0.9), row(0.172, 0.2)],
    }
    picture = plot_kept(lines, BASELINE, tmp_path / "kept.svg").read_text()
    for text in ("random", "FastV", "unpruned", METRIC, "10", "17", "50"):
        assert f"<!-- {text}" in picture  # as matplotlib notes the text of its glyphs
    assert "exact_match_corner" not in picture


def test_a_metric_is_a_panel_and_rows_without_it_are_left_out(tmp_path):
    lines = {"a": [row(0.5, 0.8, **{"t acc": 0.4}), row(0.1, None)], "b": [{"kept": 0.2}]}
    picture = plot_kept(lines, {"name": "16-bit"}, tmp_path / "kept.svg").read_text()
    assert "<!-- t acc" in picture and f"<!-- {METRIC}" in picture
    assert "unpruned" not in picture


def test_nothing_to_draw_is_said(tmp_path):
    with pytest.raises(UsageError, match="no row has an accuracy; columns are name, kept"):
        plot_kept({"a": [{"name": "a", "kept": 0.5}]}, BASELINE, tmp_path / "kept.png")
