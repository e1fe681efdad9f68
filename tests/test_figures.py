"""Figures: what is drawn, that text stays text, and that long and empty inputs stay legible."""

import html
import inspect
import math
import re
from itertools import pairwise
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
import torch
from plotly.subplots import make_subplots

import lens_probes as lp
from lens_probes import figures
from lens_probes.examples import tiny
from lens_probes.figures import Line, TokenPath
from lens_probes.registry import siblings
from lens_probes.testing import TOPICS


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
        ("a\u00a0b\u3000", "a·b·"),
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
    drawn, band = traces(figures.lines({"y": [line]}, ["0", "1", "2"], title="t", x_title="x"))
    assert list(drawn.y) == [1.0, 2.0, 3.0]
    assert list(band.x) == ["0", "2", "2", "0"]
    assert list(band.y) == [2.0, 4.0, 2.0, 0.0]
    assert band.mode == "lines"


def test_a_name_stands_in_the_legend_once_however_many_panels_have_it():
    figure = figures.lines({"y": [Line("a", [1, 2])], "z": [Line("a", [3, 4])]}, ["0", "1"], title="t", x_title="x")
    assert [trace.showlegend for trace in traces(figure)] == [True, False]
    assert figure.layout.width <= 1140


@pytest.mark.parametrize("n", [1, 3, 30, 100])
@pytest.mark.parametrize("width", [300, 600, 1200])
def test_a_layer_axis_writes_out_no_more_labels_than_fit(n, width):
    labels = [f"{i}_attn_out" for i in range(n)]
    axis = figures.lines({"y": [Line("a", [1.0] * n)]}, labels, title="t", x_title="x", width=width).layout.xaxis
    each = 16 if axis.tickangle else 7 * max(map(len, labels))
    assert 1 <= len(axis.tickvals) <= max(1, (width - 100) / each)
    assert axis.tickvals[0] == labels[0] and list(axis.categoryarray) == labels


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
    assert [trace.name for trace in traces(figure)] == ["b", "a", "content", "function"]
    assert [trace.line.width for trace in traces(figure)] == [1, 4, 3, 3]
    assert [trace.text for trace in traces(figure)[:2]] == [("", " b"), ("", " <b>a</b>")]
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


# How a figure looks


@pytest.mark.parametrize(
    ("look", "error", "message"),
    [
        ({"width": -3}, ValueError, r"figure\(width=\.\.\.\) must be a whole number of pixels, 200 or more; got -3"),
        (
            {"width": 500.0},
            ValueError,
            r"figure\(width=\.\.\.\) must be a whole number of pixels, 200 or more; got 500\.0",
        ),
        ({"width": True}, ValueError, "got True"),
        ({"height": "tall"}, ValueError, r"figure\(height=\.\.\.\) must be a whole number of pixels, .*; got 'tall'"),
        ({"template": "dark"}, ValueError, r"figure\(template=\.\.\.\) must be a Plotly template .*; got 'dark'"),
        ({"template": 3}, ValueError, "got 3"),
        ({"widht": 500}, TypeError, "a figure takes the options width, height, template; got widht"),
    ],
)
@pytest.mark.usefixtures("as_users_run_it")
def test_a_look_that_no_figure_has_is_refused(look, error, message):
    for draw in (draw_lines, draw_grid):
        with pytest.raises(error, match=message):
            draw(**look)


def draw_lines(title: str = "t", **look: Any) -> go.Figure:
    return figures.lines({"y": [Line("a", [1, 2, 3])]}, ["0", "1", "2"], title=title, x_title="x", **look)


def draw_grid(title: str = "t", **look: Any) -> go.Figure:
    drawn = {"x": ["a", "b"], "y": ["c", "d"], "x_title": "x", "y_title": "y", "colour_title": "c"}
    return figures.heatmap([[1.0, -1.0], [0.0, math.nan]], title=title, signed=True, **drawn, **look)


@pytest.mark.parametrize("width", [300, 500, 1000])
def test_a_title_is_broken_at_the_width_and_has_room_above_the_plot(width):
    words = [f"word{i}" for i in range(40)]
    figure = draw_lines(f"{' '.join(words)}\n{' '.join(words)}", width=width)
    shown = [re.sub("<.*?>", "", line) for line in figure.layout.title.text.split("<br>")]
    assert " ".join(shown).split() == words * 2
    assert all(len(line) <= width / 6.4 for line in shown)
    assert figure.layout.margin.t >= 16 * len(shown) + 20
    assert "color" not in figure.layout.title.text  # the template's own, on black too


@pytest.mark.parametrize("height", [350, 450, 600])
def test_the_unit_and_range_of_an_axis_stay_together_where_its_title_is_broken(height):
    panels = {"log-probability of the target, of all tokens of the prompt (nats, at most 0)": [Line("a", [1, 2])]}
    title = figures.lines(panels, ["0", "1"], title="t", x_title="x", height=height).layout.yaxis.title.text
    assert "(nats, at most 0)" in title and title.replace("<br>", " ") == next(iter(panels))
    assert max(map(len, title.split("<br>"))) <= max(100, height) / 6.8


def test_a_token_in_a_title_keeps_its_space_and_the_line_does_not_end_there():
    figure = draw_lines(f"{'x' * 20} to {figures.quoted(' <Mary')}", width=250)
    assert [html.unescape(line) for line in re.findall("<b>(.*?)</b>", figure.layout.title.text)] == [
        f"{'x' * 20} to",
        "' <Mary'",
    ]


@pytest.mark.parametrize("colour", [*figures.CLASS_COLOURS.values(), *figures.OTHER_COLOURS, figures.GREY])
@pytest.mark.parametrize("background", [(255, 255, 255), (17, 17, 17)])
def test_every_colour_is_seen_on_white_and_on_black(colour, background):
    def brightness(parts: Any) -> float:
        linear = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in (each / 255 for each in parts))
        return sum(weight * p for weight, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    one, other = sorted((brightness(bytes.fromhex(colour[1:])), brightness(background)))
    assert (other + 0.05) / (one + 0.05) > 2.2


def test_a_logarithmic_axis_writes_out_round_numbers():
    panels = {"y": [Line("a", [1.0, 40_000.0])], "z": [Line("a", [1.0, 30.0])], "w": [Line("a", [math.nan, math.nan])]}
    layout = figures.lines(panels, ["0", "1"], title="t", x_title="x", logarithmic=["y", "z", "w"]).layout
    assert list(layout.yaxis.ticktext) == ["1", "10", "100", "1,000", "10,000"]
    assert list(layout.yaxis2.ticktext) == ["1", "2", "5", "10", "20"]
    assert layout.yaxis3.type == "log"


def test_the_lowest_figure_still_has_a_plot():
    margin = draw_lines("word " * 99, width=200, height=200).layout.margin
    assert margin.t + margin.b <= 100 and margin.l + margin.r <= 150


def test_panels_without_room_stand_below_each_other():
    panels = {name: [Line("a", [1, 2])] for name in "xyz"}
    domains = [
        {figure.layout[f"xaxis{n}"].domain for n in ("", 2, 3)}
        for figure in (figures.lines(panels, ["0", "1"], title="t", x_title="x", width=width) for width in (1000, 500))
    ]
    assert [len(each) for each in domains] == [3, 1]


# All figures of all results

TEXT = "Time flies like an arrow, and fruit flies like a banana."
PAIR = ["The cat left the mat. A, it slept."] * 2


def results() -> dict[str, Any]:
    """One result of every probe and experiment, of tiny models."""
    gpt2, llama = tiny.bridge("gpt2"), tiny.bridge("llama")
    images = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    ablated = lp.TopicAblation(k=2, draws=2).run(gpt2, TOPICS, progress=False)
    quick: dict[str, Any] = {"progress": False}
    return {
        "AttentionPair": lp.AttentionPair("it", ("cat", "mat")).run(gpt2, PAIR, **quick),
        "AttentionPatterns": lp.AttentionPatterns(keep_patterns=True).run(gpt2, TEXT, **quick),
        "AttentionWindow": lp.AttentionWindow(radii=[1, 3]).run(gpt2, lp.demo.sentences()[:5], **quick),
        "CrossAttention": lp.CrossAttention().run(tiny.bridge("bart"), lp.Prompt(TEXT, target="Fruit flies."), **quick),
        "DirectLogitAttribution": lp.DirectLogitAttribution().run(gpt2, TEXT, **quick),
        "EmbeddingDensity": lp.EmbeddingDensity().run(gpt2, TEXT, **quick),
        "FeatureVisualization": lp.FeatureVisualization(1, [2, 3], steps=2).run(tiny.vit(), images, **quick),
        "HeadAblation": lp.HeadAblation(steps=2, draws=2).run(gpt2, lp.demo.sentences()[:4], **quick),
        "HeadTopicSimilarity": lp.HeadTopicSimilarity().run(gpt2, TOPICS, **quick),
        "HeadValueRank": lp.HeadValueRank().run(gpt2, TEXT, **quick),
        "ImageReconstruction": lp.ImageReconstruction(1, steps=2).run(tiny.vit(), images, **quick),
        "InputReconstruction": lp.InputReconstruction(1, steps=2).run(gpt2, TEXT, **quick),
        "KeyValueOverlap": lp.KeyValueOverlap().run(llama, TEXT, **quick),
        "LayerSkip": lp.LayerSkip().run(gpt2, lp.demo.sentences()[:5], **quick),
        "LensComparison": lp.LensComparison({"doubled": lambda state, label: 2 * state}).run(gpt2, TEXT, **quick),
        "LogitLens": lp.LogitLens().run(gpt2, TEXT, **quick),
        "MassiveActivations": lp.MassiveActivations(threshold=8.0).run(gpt2, TEXT, **quick),
        "UnitActivation": lp.UnitActivation(layers=[1]).run(gpt2, TEXT, **quick),
        "MaxActivatingExamples": lp.MaxActivatingExamples(k=3).run(gpt2, TEXT, **quick),
        "MaxActivatingTokens": lp.MaxActivatingTokens(1, [2, 3], steps=2).run(gpt2, TEXT, **quick),
        "PositionReach": lp.PositionReach(projections=2).run(gpt2, TEXT, **quick),
        "RankShift": lp.RankShift(neighbours=2).run(gpt2, TEXT, **quick),
        "ResidualMean": lp.ResidualMean().run(gpt2, TEXT, **quick),
        "ResidualUpdate": lp.ResidualUpdate().run(gpt2, TEXT, **quick),
        "SourceAttribution": lp.SourceAttribution().run(gpt2, TEXT, **quick),
        "StateDimension": lp.StateDimension(draws=2).run(gpt2, lp.demo.sentences()[:5], **quick),
        "TiedKeyValue": lp.TiedKeyValue().run(llama, lp.demo.sentences()[:4], **quick),
        "TopicAblation": ablated,
        "TopicActivity": lp.TopicActivity().run(gpt2, TOPICS, **quick),
        "TunedLens": lp.TunedLens(steps=2).run(gpt2, lp.demo.sentences()[:4], **quick),
    }


ARGUMENTS: dict[str, Any] = {
    "layer": 1,
    "head": 1,
    "token": 2,
    "heads": [(0, 1), (2, 3)],
}


def drawn(result: Any, **look: Any) -> dict[str, go.Figure]:
    """Every figure of a result, by the name of its method."""
    found = {}
    for name in dir(type(result)):
        if name.startswith("figure"):
            method = getattr(result, name)
            needed = [p.name for p in inspect.signature(method).parameters.values() if p.default is p.empty]
            given = {each: ARGUMENTS[each] for each in needed if each in ARGUMENTS}
            if "table" in needed:
                if not hasattr(result, "test") and not hasattr(result, "contrast"):
                    continue
                given["table"] = result.test(permutations=9) if hasattr(result, "test") else table_of(result)
            found[name] = method(**given, **look)
    return found


def table_of(result: Any) -> Any:
    return result.selectivity(permutations=9) if hasattr(result, "selectivity") else result.contrast(permutations=9)


@pytest.fixture(scope="module")
def every() -> dict[str, Any]:
    return results()


def test_every_probe_and_experiment_is_drawn_here(every):
    kinds = {name for name, kind in siblings().items() if issubclass(kind, lp.Probe | lp.Experiment)}
    assert kinds == set(every)


def each_figure(every: dict[str, Any], **look: Any) -> Any:
    return ((f"{name}.{method}", f) for name, result in every.items() for method, f in drawn(result, **look).items())


@pytest.mark.filterwarnings("ignore")
def test_every_figure_takes_a_size_and_a_template(every):
    for name, figure in each_figure(every, width=500, height=450, template="plotly_dark"):
        assert (figure.layout.width, figure.layout.height) == (500, 450), name
        assert figure.layout.template.layout.paper_bgcolor == "rgb(17,17,17)", name
        assert figure.layout.font.color is None and figure.layout.plot_bgcolor is None, name
        lines = [re.sub("<.*?>", "", line) for line in figure.layout.title.text.split("<br>")]
        assert max(map(len, lines)) <= 500 / 6.2, name


@pytest.mark.filterwarnings("ignore")
def test_every_trace_can_be_copied_into_a_panel_and_keeps_values_and_labels(every):
    for name, figure in each_figure(every):
        kinds = [[{"type": "table" if trace.type == "table" else "xy"} for trace in figure.data]]
        copy = make_subplots(1, len(figure.data), specs=kinds)
        for column, trace in enumerate(figure.data, start=1):
            copy.add_trace(trace, row=1, col=column)
        first = copy.data[0]
        if first.type == "heatmap":
            labels = figure.layout.xaxis.categoryarray, figure.layout.yaxis.categoryarray
            assert (first.x, first.y) == labels, name
            assert len(set(first.x)) == len(first.x) and len(set(first.y)) == len(first.y), name
            assert any(value is not None for row in first.z for value in row), name
            assert first.zmin < first.zmax and first.colorbar.title.text, name
        elif first.type in ("scatter", "bar"):
            assert any(y is not None and math.isfinite(y) for y in first.y) and first.x[0] is not None, name
            assert first.type == "bar" or first.name, name
        else:
            assert first.type in ("table", "image"), name


@pytest.mark.filterwarnings("ignore")
def test_values_on_both_sides_of_0_have_a_scale_with_white_at_0(every):
    for name, figure in each_figure(every):
        for trace in (each for each in figure.data if each.type == "heatmap"):
            values = [value for row in trace.z for value in row if value is not None and math.isfinite(value)]
            if values and min(values) < 0 < max(values):
                assert trace.zmin == -trace.zmax, name


@pytest.mark.parametrize("highest", [5.0, 40.0, 1000.0, 49_151.0])
def test_ticks_of_a_logarithmic_colour_bar_have_room_on_a_tiny_grid(highest):
    drawn = {"x": ["a", "b"], "y": ["0"], "title": "t", "x_title": "x", "y_title": "y", "colour_title": "c"}
    figure = figures.heatmap([[0.0, highest]], logarithmic=True, **drawn, height=220)
    (trace,), layout = figure.data, figure.layout
    length = layout.height - layout.margin.t - layout.margin.b
    places = [tick / (trace.zmax - trace.zmin) * length for tick in trace.colorbar.tickvals]
    assert trace.colorbar.ticktext[0] == "0" and len(places) == len(trace.colorbar.ticktext) > 1
    assert min(after - before for before, after in pairwise(places)) >= 14
