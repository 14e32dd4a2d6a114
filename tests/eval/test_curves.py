"""The plot of accuracy against kept tokens: what is in it, and what cannot be drawn."""

from compress.errors import UsageError
from compress.eval.curves import plot_lines
from compress.eval.report import Row
from support.refusals import refused

METRIC = "demo_vqa exact_match"


def row(kept, value, **more):
    return Row(f"x keep={kept}", {"kept": kept, METRIC: value} | more, {METRIC: 0.01})


BASELINE = Row("16-bit", {"kept": 1.0, METRIC: 0.96}, {METRIC: 0.005})


def test_every_method_has_a_line_and_every_budget_a_tick(tmp_path):
    lines = {
        "random": [row(0.5, 0.8), row(0.1, 0.3)],
        "FastV": [row(0.5, 0.9), row(0.172, 0.2)],
    }
    picture = plot_lines(lines, BASELINE, tmp_path / "kept.svg", "kept").read_text()
    for text in ("random", "FastV", "16-bit", METRIC, "10", "17", "50"):
        assert f"<!-- {text}" in picture  # as matplotlib notes the text of its glyphs
    assert "exact_match_corner" not in picture


def test_a_metric_is_a_panel_and_rows_without_it_are_left_out(tmp_path):
    lines = {"a": [row(0.5, 0.8, **{"t acc": 0.4}), row(0.1, None)], "b": [Row("b", {"kept": 0.2})]}
    picture = plot_lines(lines, Row("16-bit", {}), tmp_path / "kept.svg", "kept").read_text()
    assert "<!-- t acc" in picture and f"<!-- {METRIC}" in picture
    assert "<!-- 16-bit" not in picture


def test_nothing_to_draw_is_said(tmp_path):
    with refused(UsageError, "acc", "exact_match", "kept"):
        plot_lines({"a": [Row("a", {"kept": 0.5})]}, BASELINE, tmp_path / "kept.png", "kept")


def test_over_bytes_lower_perplexity_is_better(tmp_path):
    line = [Row(f"LIM narrow={n}", {"bytes": 1e6 * n, "perplexity": 10 / n}) for n in (1, 2)]
    baseline = Row("16-bit", {"perplexity": 4.0})
    picture = plot_lines({"LIM": line}, baseline, tmp_path / "bytes.svg", "bytes").read_text()
    for text in ("LIM", "16-bit", "perplexity (lower is better)", "tensors of the checkpoint (MB)"):
        assert f"<!-- {text}" in picture
