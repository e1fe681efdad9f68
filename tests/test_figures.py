"""Figures: what is drawn, that text stays text, and that long and empty inputs stay legible."""

import html
import math
from itertools import pairwise
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest

from lens_probes import figures
from lens_probes.figures import Line, TokenPath


def traces(figure: go.Figure) -> Any:
    return figure.data


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" the", "·the"),
        ("a\tb\n", "a⇥b⏎"),
        ("</b>", "&lt;/b&gt;"),
        ("&lt;", "&amp;lt;"),
        ("\u200b\u202e", "\\u200b\\u202e"),
        ("\x00", "\\u0000"),
        ("", ""),
        ("🙂", "🙂"),
        ("x" * 30, "x" * 23 + "…"),
        ("<" * 30, "&lt;" * 23 + "…"),
        ("م", "\u2068م\u2069"),
    ],
)
def test_token_text_is_shown_whole_and_cannot_act_as_html(text, shown):
    assert figures.visible(text) == shown


def test_what_is_visible_reads_back_as_the_text_that_was_shown():
    assert html.unescape(figures.visible("<a href='x'>&amp;")) == "<a·href='x'>&amp;"


def test_a_band_leaves_out_points_without_an_interval():
    line = Line("a", [1.0, 2.0, 3.0], low=[0.0, math.nan, 2.0], high=[2.0, math.nan, 4.0])
    (band,) = traces(figures.lines({"y": [line]}, ["0", "1", "2"], title="t", x_title="x"))[:1]
    assert list(band.x) == ["0", "2", "2", "0"]
    assert list(band.y) == [2.0, 4.0, 2.0, 0.0]
    assert band.mode == "lines"


def test_a_name_stands_in_the_legend_once_however_many_panels_have_it():
    figure = figures.lines({"y": [Line("a", [1, 2])], "z": [Line("a", [3, 4])]}, ["0", "1"], title="t", x_title="x")
    assert [trace.showlegend for trace in traces(figure)] == [True, False]
    assert figure.layout.width <= 1140


@pytest.mark.parametrize("n", [1, 3, 30, 100])
def test_a_layer_axis_writes_out_no_more_labels_than_fit(n):
    labels = [f"{i}_attn_out" for i in range(n)]
    ticks = figures._ticks(labels, width=400)
    assert 1 <= len(ticks["tickvals"]) <= 5
    assert ticks["tickvals"][0] == labels[0]
    assert ticks["categoryarray"] == labels


def test_labels_at_the_ends_of_paths_keep_a_distance_and_the_bold_one_is_always_there():
    paths = [figures.TokenPath(f"{i}", "content", [0.0, float(i), math.nan], "blue") for i in range(200)]
    labelled = figures._room(paths, bold=37)
    heights = sorted(paths[i].y[end] for i, end in labelled)
    assert labelled[0] == (37, 1)
    assert len(labelled) <= 24
    assert min(b - a for a, b in pairwise(heights)) > 199 / 24


def test_paths_put_the_bold_one_on_top_and_name_the_groups():
    tokens = [TokenPath("a", "content", [0, 1], "#0072B2"), TokenPath("b", "function", [1, 0], "#D55E00")]
    figure = figures.paths(tokens, 0, ["0", "1"], title="t", x_title="x", y_title="y", upside_down=True)
    assert [trace.name for trace in traces(figure)] == ["content", "function", "b", "a"]
    assert [trace.line.width for trace in traces(figure)] == [3, 3, 1, 4]
    assert figure.layout.yaxis.autorange == "reversed"


def test_bars_show_value_interval_and_note():
    figure = figures.bars({"content": (0.5, 0.4, 0.7)}, title="t", y_title="y", notes={"content": "3 types"})
    bar = traces(figure)[0]
    assert bar.y == (0.5,)
    assert bar.error_y.array == pytest.approx((0.2,)) and bar.error_y.arrayminus == pytest.approx((0.1,))
    assert bar.x == ("content<br>3 types",)


def test_a_bar_without_an_interval_has_no_whisker():
    bar = traces(figures.bars({"a": (0.5, math.nan, math.nan)}, title="t", y_title="y", notes={}))[0]
    for drawn in (bar.error_y.array, bar.error_y.arrayminus):
        assert isinstance(drawn, np.ndarray)  # a list would send null, which is drawn as an interval of 0
        assert np.isnan(drawn).all()


def test_word_classes_have_one_colour_each_and_a_users_own_get_others():
    classes = ["content", "function", "noun", "verb"]
    colours = [figures.class_colour(each, classes) for each in classes]
    assert len(set(colours)) == 4
    assert colours[0] == figures.CLASS_COLOURS["content"]


def test_a_page_escapes_headings_and_carries_plotly_once(tmp_path):
    figure = figures.lines({"y": [Line("a", [1, 2])]}, ["0", "1"], title="<i>t", x_title="x")
    path = tmp_path / "page.html"
    figures.write_page(path, "<script>", [("<b>head", "a & b", figure), ("second", "", figure)])
    page = path.read_text(encoding="utf-8")
    assert "<title>&lt;script&gt;</title>" in page
    assert "&lt;b&gt;head" in page and "a &amp; b" in page
    assert page.count("plotly.js v") == 1
    assert "src=" not in page.split("<body>")[1].split("<script")[0]
    assert [each.name for each in tmp_path.iterdir()] == ["page.html"]


def test_a_failed_write_leaves_the_old_page(tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    path.write_text("old")
    monkeypatch.setattr(figures, "page", lambda title, sections: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        figures.write_page(path, "t", [])
    assert path.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["page.html"]
