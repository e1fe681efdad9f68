"""The only file that builds Plotly figures: lines with bands, labelled paths, heatmaps, bars, tables, and their page.

Colours mean word classes, the same everywhere. Token text goes through `visible`: spaces and control characters are
shown, and nothing in it can act as HTML (Plotly reads a part of HTML in every label).
"""

import html
import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.express as px
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lens_probes.messages import amount

# Colours of Okabe and Ito, told apart with colour-blind eyes too.
CLASS_COLOURS = {
    "content": "#0072B2",
    "function": "#D55E00",
    "number": "#009E73",
    "punctuation": "#AA4499",
    "special": "#777777",
}
OTHER_COLOURS = ("#56B4E9", "#E69F00", "#117733", "#882255", "#332288")
Numbers = Sequence[float] | Sequence[int]
FEW_WORDS = 10
FEW_NAMES = 14
ROWS, COLUMNS = 60, 40  # of a heatmap: more cannot be read
CHOSEN = "#0072B2"
GREY = "#9A9A9A"
INK = "#222222"

TEMPLATE = go.layout.Template(
    layout=go.Layout(
        font={"family": "Helvetica, Arial, sans-serif", "size": 13, "color": INK},
        title={"x": 0.01, "xanchor": "left", "y": 0.97, "yanchor": "top", "font": {"size": 16}},
        paper_bgcolor="white",
        plot_bgcolor="white",
        margin={"l": 70, "r": 30, "t": 90, "b": 60},
        xaxis={
            "showline": True,
            "linecolor": INK,
            "ticks": "outside",
            "gridcolor": "#EEEEEE",
            "zeroline": False,
        },
        yaxis={
            "showline": True,
            "linecolor": INK,
            "ticks": "outside",
            "gridcolor": "#EEEEEE",
            "zeroline": False,
        },
        legend={"orientation": "h", "y": -0.22, "x": 0, "yanchor": "top"},
        hoverlabel={"font": {"family": "Menlo, Consolas, monospace"}},
    )
)


def visible(text: str, longest: int = 24) -> str:
    """Token text for a figure: spaces as ·, line ends as ⏎, unseen characters by number, HTML escaped, cut if long.

    >>> visible(" a</b>\\n")
    '·a&lt;/b&gt;⏎'
    """
    return html.escape(spelled(text, longest), quote=False)


def named(text: str, longest: int = 24) -> str:
    """The same for a name, such as a topic's, whose spaces are no news.

    >>> named("<b> Python")
    '&lt;b&gt; Python'
    """
    cut = text if len(text) <= longest else f"{text[: longest - 1]}…"
    return " ".join(visible(part, longest) for part in cut.split(" "))


def spelled(text: str, longest: int = 24) -> str:
    """`visible` before it is escaped, for names that are escaped where they are drawn."""
    shown = "".join(_seen(character) for character in text)
    shown = shown if len(shown) <= longest else shown[: longest - 1] + "…"
    if any(unicodedata.bidirectional(character) in ("R", "AL") for character in shown):
        shown = f"\u2068{shown}\u2069"  # isolated, or it would turn round the number beside it
    return shown


def _seen(character: str) -> str:
    named = {" ": "·", "\n": "⏎", "\t": "⇥"}.get(character)
    if named is None and unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp", "Zs", "Co", "Cn", "Cs"):
        named = f"\\u{ord(character):04x}"
    return named or character


def class_colour(name: str, among: Sequence[str]) -> str:
    """The colour of a word class; classes of the user's own get the next free one."""
    own = [each for each in among if each not in CLASS_COLOURS]
    return CLASS_COLOURS[name] if name in CLASS_COLOURS else OTHER_COLOURS[own.index(name) % len(OTHER_COLOURS)]


@dataclass(frozen=True)
class Line:
    """One line of a panel: its points, the band around them if it has one, and how it looks."""

    name: str
    y: Numbers
    low: Numbers | None = None
    high: Numbers | None = None
    colour: str = INK
    dashed: bool = False


def shown_classes(table: pd.DataFrame) -> list[str]:
    """The word classes of a table that have enough words for a line of their own; all of them if none has."""
    classes = list(dict.fromkeys(table["word_class"]))
    large = set(table.loc[table["words"] >= FEW_WORDS, "word_class"])
    return [each for each in classes if each in large] or classes


def class_lines(table: pd.DataFrame, quantity: str, classes: Sequence[str]) -> list[Line]:
    """The median of a quantity over layers with its interval, a line a word class, from a table by word class."""
    drawn = []
    for word_class in classes:
        rows = table[(table["quantity"] == quantity) & (table["word_class"] == word_class)]
        if len(rows):
            name = f"{word_class} ({amount(max(rows['words']), 'word')})"
            colour = class_colour(word_class, classes)
            drawn.append(Line(name, list(rows["median"]), list(rows["low"]), list(rows["high"]), colour))
    return drawn


def lines(
    panels: Mapping[str, Sequence[Line]],
    x: Sequence[str],
    *,
    title: str,
    x_title: str,
    upside_down: Sequence[str] = (),
    logarithmic: Sequence[str] = (),
) -> go.Figure:
    """Panels side by side, each with its y title as key; lines of one name share a colour and a legend entry.

    `upside_down` names the panels whose small values stand on top, `logarithmic` those with a logarithmic axis.
    """
    width = min(480, 1080 // len(panels))
    figure = make_subplots(rows=1, cols=len(panels), horizontal_spacing=0.24 / len(panels))
    shown: set[str] = set()
    for column, (y_title, drawn) in enumerate(panels.items(), start=1):
        for line in drawn:
            if line.low is not None and line.high is not None:
                figure.add_trace(_band(line, x), row=1, col=column)
            figure.add_trace(
                go.Scatter(
                    x=list(x),
                    y=list(line.y),
                    name=line.name,
                    legendgroup=line.name,
                    showlegend=line.name not in shown,
                    mode="lines+markers" if len(x) < 3 else "lines",
                    line={"color": line.colour, "width": 1.6 if line.dashed else 2.4, "dash": _dash(line)},
                    hovertemplate=f"{html.escape(line.name)}<br>%{{x}}: %{{y:.4g}}<extra></extra>",
                ),
                row=1,
                col=column,
            )
            shown.add(line.name)
        figure.update_xaxes(title_text=x_title, row=1, col=column, **_ticks(x, width - 80))
        figure.update_yaxes(
            title_text=y_title,
            autorange="reversed" if y_title in upside_down else True,
            **_scale(y_title in logarithmic),
            row=1,
            col=column,
        )
    figure.update_layout(template=TEMPLATE, title=_title(title), width=width * len(panels) + 60, height=500)
    return figure


def _band(line: Line, x: Sequence[str]) -> go.Scatter:
    """The area between low and high, without the points where there is no interval."""
    known = [
        (label, low, high)
        for label, low, high in zip(x, line.low or (), line.high or (), strict=True)
        if math.isfinite(low) and math.isfinite(high)
    ]
    return go.Scatter(
        x=[label for label, _, _ in known] + [label for label, _, _ in reversed(known)],
        y=[high for _, _, high in known] + [low for _, low, _ in reversed(known)],
        mode="lines",
        fill="toself",
        fillcolor=_faint(line.colour),
        line={"width": 0},
        legendgroup=line.name,
        showlegend=False,
        hoverinfo="skip",
    )


def _dash(line: Line) -> str:
    return "dot" if line.dashed else "solid"


def _faint(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.15)"


def _ticks(x: Sequence[str], width: int) -> dict[str, Any]:
    """All labels of a layer axis in their order, as many of them written out as there is room for."""
    room = max(1, width // (9 * max(map(len, x), default=1) + 12))
    return {
        "type": "category",
        "categoryorder": "array",
        "categoryarray": list(x),
        "tickvals": list(x)[:: math.ceil(len(x) / room)],
        "tickangle": 0,
    }


def _slanted(x: Sequence[str], width: int) -> dict[str, Any]:
    """All labels at a slant, where they are few, and names too long to stand side by side."""
    if len(x) > FEW_NAMES or max(map(len, x), default=0) * 9 * len(x) <= width:
        return {}
    return {"type": "category", "tickvals": list(x), "tickangle": -40, "automargin": True}


def _scale(logarithmic: bool) -> dict[str, Any]:
    return {"type": "log", "dtick": "D2"} if logarithmic else {}


def _title(title: str) -> dict[str, Any]:
    """A title whose second and later lines are smaller."""
    first, *rest = title.split("\n")
    small = "".join(f"<br><span style='font-size:12px;color:#555555'>{html.escape(line)}</span>" for line in rest)
    return {"text": f"<b>{html.escape(first)}</b>{small}"}


@dataclass(frozen=True)
class TokenPath:
    """One token's values along the x axis, NaN where there is none; `note` stands behind its text on hovering."""

    text: str
    group: str
    y: Numbers
    colour: str
    note: str = ""

    @property
    def end(self) -> int | None:
        """Where its last value stands."""
        return max((i for i, y in enumerate(self.y) if math.isfinite(y)), default=None)


def paths(
    tokens: Sequence[TokenPath],
    bold: int,
    x: Sequence[str],
    *,
    title: str,
    x_title: str,
    y_title: str,
    upside_down: bool = False,
) -> go.Figure:
    """One line a token in the colour of its group, one of them bold, labels where they end if there is room."""
    figure = go.Figure()
    for group, colour in dict.fromkeys((token.group, token.colour) for token in tokens):
        sample = go.Scatter(
            x=[None], y=[None], mode="lines", name=html.escape(group), line={"color": colour, "width": 3}
        )
        figure.add_trace(sample)
    for i in [*(i for i in range(len(tokens)) if i != bold), bold]:  # the bold one last, on top
        token = tokens[i]
        figure.add_trace(
            go.Scatter(
                x=list(x),
                y=list(token.y),
                mode="lines" if len(x) > 2 and all(map(math.isfinite, token.y)) else "lines+markers",
                line={"color": token.colour, "width": 4 if i == bold else 1},
                marker={"size": 5},
                opacity=1.0 if i == bold else max(0.25, min(0.7, 12 / len(tokens))),
                showlegend=False,
                name=visible(token.text),
                hovertemplate=f"{visible(token.text)}{html.escape(token.note)}<br>%{{x}}: %{{y:.5g}}<extra></extra>",
            )
        )
    for i, end in _room(tokens, bold):
        figure.add_annotation(
            x=x[end],
            xanchor="left",
            xshift=6,
            y=tokens[i].y[end],
            text=f"<b>{visible(tokens[i].text)}</b>" if i == bold else visible(tokens[i].text, 16),
            font={"color": tokens[i].colour, "size": 14 if i == bold else 11},
            showarrow=False,
        )
    figure.update_xaxes(title_text=x_title, **_ticks(x, 600))
    figure.update_yaxes(title_text=y_title, autorange="reversed" if upside_down else True)
    figure.update_layout(template=TEMPLATE, title=_title(title), width=860, height=560, margin={"r": 170})
    return figure


def _room(tokens: Sequence[TokenPath], bold: int) -> list[tuple[int, int]]:
    """Which paths get a label, and where: the bold one, then those that end a label's height from those labelled."""
    ends = {i: end for i, token in enumerate(tokens) if (end := token.end) is not None}
    known = [tokens[i].y[end] for i, end in ends.items()]
    height = (max(known) - min(known)) / 24 if known else 0.0
    labelled: list[tuple[int, int]] = []
    for i in sorted(ends, key=lambda i: i != bold):
        y = tokens[i].y[ends[i]]
        if not labelled or all(abs(y - tokens[j].y[end]) > height for j, end in labelled):
            labelled.append((i, ends[i]))
    return labelled


def heatmap(
    z: Sequence[Numbers],
    *,
    x: Sequence[str],
    y: Sequence[str],
    title: str,
    x_title: str,
    y_title: str,
    colour_title: str,
    low: int | float | None = None,
    high: int | float | None = None,
    dark_is_high: bool = True,
    logarithmic: bool = False,
    signed: bool = False,
    text: Sequence[Sequence[str]] | None = None,
    hover: Sequence[Sequence[str]] | None = None,
) -> go.Figure:
    """A grid of numbers, rows from the top, with a text in each cell; wide ones are thinned to every nth column.

    What is below `low` or above `high` has their colour; `signed`: red below and blue above 0. `y`, `text` and `hover`
    must have gone through `visible` where they hold token text.
    """
    step = math.ceil(len(x) / COLUMNS)
    kept = range((len(x) - 1) % step, len(x), step)  # the last column always
    shown = [[row[i] if math.isfinite(row[i]) else None for i in kept] for row in z]
    thinned = f"; one column in {step}" if step > 1 else ""
    colours = [[value and math.log10(value + 1) for value in row] for row in shown] if logarithmic else shown
    if signed:
        high = _largest(shown)
        low = -high
    figure = go.Figure(
        go.Heatmap(
            z=colours,
            x=[x[i] for i in kept],
            y=list(range(len(y))),  # by number: two rows may have one label
            zmin=low,
            zmax=high,
            zauto=False if low is not None and high is not None else None,
            colorscale="RdBu" if signed else "Blues",
            reversescale=not dark_is_high,
            colorbar={"title": {"text": colour_title, "side": "right"}, **(_decades(colours) if logarithmic else {})},
            text=[[row[i] for i in kept] for row in text] if text else None,
            texttemplate="%{text}" if text else None,
            textfont={"size": 10},
            hovertext=[[row[i] for i in kept] for row in hover] if hover else None,
            hoverinfo="text" if hover else "x+z",
            xgap=1,
            ygap=1,
        )
    )
    width = 46 * len(kept) if text else 22 * len(kept)
    names = [x[i] for i in kept]
    figure.update_xaxes(
        title_text=x_title, title_standoff=10, **_slanted(names, width) or _ticks(names, max(width, 300))
    )
    figure.update_yaxes(
        title_text=y_title,
        autorange="reversed",
        tickvals=list(range(len(y))),
        ticktext=list(y),
        title_standoff=10,
        tickfont={"size": 11},
        automargin=True,
    )
    figure.update_layout(
        template=TEMPLATE,
        title=_title(f"{title}{thinned}"),
        width=max(width, 460) + 260,
        height=max(18 * len(y), 240) + 190,
        plot_bgcolor="#F4F4F4",
    )
    return figure


def _known(z: Sequence[Numbers]) -> list[list[float | None]]:
    """The numbers, with nothing where one is missing."""
    return [[value if math.isfinite(value) else None for value in row] for row in z]


def _largest(z: Sequence[Sequence[float | None]]) -> float:
    """How far a colour scale around 0 must reach."""
    known = (abs(value) for row in z for value in row if value is not None and math.isfinite(value))
    return max(known, default=0.0) or 1.0


def _decades(colours: Sequence[Sequence[float | None]]) -> dict[str, Any]:
    """Ticks of a colour bar of log10(value + 1), with the values themselves."""
    highest = max((value for row in colours for value in row if value is not None), default=0.0)
    ticks = [0, *(10**n for n in range(1, math.floor(highest) + 1))]
    return {"tickvals": [math.log10(tick + 1) for tick in ticks], "ticktext": [f"{tick:,}" for tick in ticks]}


def blocks(
    z: Sequence[Numbers],
    columns: Sequence[str],
    rows: Sequence[str] | None,
    *,
    title: str,
    x_title: str,
    y_title: str,
    colour_title: str,
    signed: bool = False,
) -> go.Figure:
    """A large grid whose columns (and rows, unless None) come in groups: a group's name at its middle, borders between.

    `columns` and `rows` name the group of each, those of one group side by side. `signed`: red below and blue above 0.
    """
    values = [value for row in z for value in row if math.isfinite(value)]
    largest = _largest(z)
    figure = go.Figure(
        go.Heatmap(
            z=_known(z),
            zmin=-largest if signed else min(values, default=0.0),
            zmax=largest,
            colorscale="RdBu" if signed else "Blues",
            colorbar={"title": {"text": colour_title, "side": "right"}},
            hovertemplate="column %{x}, row %{y}: %{z:.3g}<extra></extra>",
        )
    )
    for axis, groups, other in (("x", columns, "y"), ("y", rows, "x")):
        if groups is None:
            continue
        runs = [(name, len(list(run))) for name, run in groupby(groups)]
        starts = list(accumulate((size for _, size in runs), initial=0))
        ticks = {
            "tickvals": [start + (size - 1) / 2 for start, (_, size) in zip(starts, runs, strict=False)],
            "ticktext": [named(name, 16) for name, _ in runs],
        }
        figure.update_layout({f"{axis}axis": ticks})
        for start in starts[1:-1]:
            edge = {f"{axis}0": start - 0.5, f"{axis}1": start - 0.5, f"{other}0": 0, f"{other}1": 1}
            figure.add_shape(type="line", **edge, **{f"{other}ref": "paper"}, line={"color": INK, "width": 1})
    figure.update_xaxes(title_text=x_title, title_standoff=12, tickangle=-40, automargin=True, showgrid=False)
    figure.update_yaxes(title_text=y_title, autorange="reversed", showgrid=False, automargin=True)
    figure.update_layout(template=TEMPLATE, title=_title(title), width=860, height=760 if rows else 620)
    return figure


def small_grids(
    panels: Sequence[tuple[str, Sequence[Numbers]]],
    *,
    x: Sequence[str],
    y: Sequence[str],
    title: str,
    x_title: str,
    y_title: str,
    colour_title: str,
    signed: bool = False,
) -> go.Figure:
    """Small grids of numbers, one a panel, on one colour scale; `signed`: red below and blue above 0.

    Names of panels must have gone through `named` or `visible`.
    """
    columns = min(5, len(panels))
    rows = math.ceil(len(panels) / columns)
    widest = 190 if len(panels) > 1 else 640
    width, height = max(120, min(9 * len(x), widest)), max(100, min(9 * len(y), 270))
    figure = make_subplots(
        rows=rows,
        cols=columns,
        shared_xaxes=True,
        shared_yaxes=True,
        horizontal_spacing=0.02,
        vertical_spacing=40 / (rows * (height + 40)),
        subplot_titles=[name for name, _ in panels],
    )
    for number, (_, z) in enumerate(panels):
        grid = go.Heatmap(
            z=_known(z),
            x=list(x),
            y=list(y),
            coloraxis="coloraxis",
            hovertemplate="layer %{y}, %{x}: %{z:.3g}<extra></extra>",
        )
        row, column = number // columns + 1, number % columns + 1
        figure.add_trace(grid, row=row, col=column)
        figure.update_xaxes(showticklabels=number + columns >= len(panels), row=row, col=column)
    largest = max(_largest(z) for _, z in panels)
    figure.update_xaxes(**_ticks(x, width), showgrid=False)
    figure.update_yaxes(autorange="reversed", type="category", **_every(y, height), showgrid=False)
    figure.update_annotations(font={"size": 12})
    for text, place in ((x_title, {"x": 0.5, "y": 0, "yshift": -44}), (y_title, {"x": 0, "y": 0.5, "xshift": -52})):
        figure.add_annotation(
            text=text, xref="paper", yref="paper", showarrow=False, textangle=-90 if place["x"] == 0 else 0, **place
        )
    figure.update_layout(
        template=TEMPLATE,
        title=_title(title),
        coloraxis={
            "colorscale": "RdBu" if signed else "Blues",
            **({"cmin": -largest, "cmax": largest} if signed else {}),
            "colorbar": {"title": {"text": colour_title, "side": "right"}},
        },
        width=max(columns * (width + 12) + 220, 600),
        height=rows * (height + 40) + 190,
        margin={"t": 110, "l": 70 + 7 * max(0, max(map(len, y)) - 4)},
    )
    return figure


def squares(
    panels: Sequence[tuple[str, Sequence[Numbers]]],
    *,
    x: Sequence[str],
    y: Sequence[str],
    title: str,
    x_title: str,
    y_title: str,
    colour_title: str,
) -> go.Figure:
    """Grids of shares side by side, every cell drawn however many there are, as many labels as there is room for.

    Labels must have gone through `visible`; equal ones stay apart.
    """
    wide = min(30.0, max(6.0, 560 / len(x)))
    tall = min(30.0, max(6.0, 560 / len(y)))
    width, height = max(200, wide * len(x)), max(120, tall * len(y))
    figure = make_subplots(
        rows=1,
        cols=len(panels),
        shared_yaxes=True,
        horizontal_spacing=0.12 / len(panels),
        subplot_titles=[name for name, _ in panels],
    )
    for column, (_, z) in enumerate(panels, start=1):
        grid = go.Heatmap(
            z=list(z),
            coloraxis="coloraxis",
            hovertemplate=f"{y_title} %{{y}}, {x_title} %{{x}}: %{{z:.3f}}<extra></extra>",
        )
        figure.add_trace(grid, row=1, col=column)
    figure.update_xaxes(title_text=x_title, tickangle=-60, showgrid=False, **_numbered(x, wide))
    figure.update_yaxes(autorange="reversed", showgrid=False, **_numbered(y, tall))
    figure.update_yaxes(title_text=y_title, title_standoff=12, automargin=True, row=1, col=1)
    figure.update_layout(
        template=TEMPLATE,
        title=_title(title),
        coloraxis={
            "colorscale": "Blues",
            "cmin": 0,
            "cmax": 1,
            "colorbar": {"title": {"text": colour_title, "side": "right"}},
        },
        width=max(len(panels) * (width + 20) + 260, 640),
        height=height + 260,
        margin={"l": 120, "b": 120, "t": 110},
    )
    return figure


def images(rows: Sequence[tuple[str, Sequence[tuple[str, np.ndarray]]]], *, title: str) -> go.Figure:
    """Rows of pictures, each a name and its pictures with a caption: [height width 3] of numbers from 0 to 1.

    Names and captions must have gone through `named`.
    """
    columns, height, wide = max(len(pictures) for _, pictures in rows), 150, 170
    figure = make_subplots(
        rows=len(rows),
        cols=columns,
        horizontal_spacing=0.02,
        vertical_spacing=34 / (len(rows) * (height + 34)),
        subplot_titles=[
            pictures[column][0] if column < len(pictures) else "" for _, pictures in rows for column in range(columns)
        ],
    )
    figure.update_annotations(font={"size": 11})
    for row, (name, pictures) in enumerate(rows, start=1):
        for column, (_, picture) in enumerate(pictures, start=1):
            drawn = px.imshow((picture.clip(0, 1) * 255).round().astype(np.uint8), binary_string=True).data[0]
            figure.add_trace(drawn.update(hoverinfo="skip", hovertemplate=None), row=row, col=column)
        figure.update_yaxes(title_text=name, row=row, col=1)
    figure.update_xaxes(showticklabels=False, ticks="", showline=False)
    figure.update_yaxes(showticklabels=False, ticks="", showline=False)
    for axis in figure.select_yaxes():
        axis.update(scaleanchor=axis.anchor, autorange="reversed", constrain="domain")
    figure.update_layout(
        template=TEMPLATE,
        title=_title(title),
        width=max(columns * wide + 120, 460),
        height=len(rows) * (height + 34) + 140,
        margin={"t": 110, "b": 30},
    )
    return figure


def _numbered(labels: Sequence[str], size: float) -> dict[str, Any]:
    """Labels of an axis that counts its cells, each so many pixels wide; equal labels stay apart."""
    step = math.ceil(14 / size)
    places = list(range(0, len(labels), step))
    return {"tickvals": places, "ticktext": [labels[i] for i in places], "tickfont": {"size": 11}}


def _every(y: Sequence[str], height: int) -> dict[str, Any]:
    """As many labels of a vertical axis as there is room for."""
    return {"tickvals": list(y)[:: math.ceil(len(y) * 14 / height)]}


def grid_with_bars(
    z: Sequence[Numbers],
    bars_: Mapping[str, Numbers],
    *,
    x: Sequence[str],
    y: Sequence[str],
    title: str,
    x_title: str,
    y_title: str,
    colour_title: str,
) -> go.Figure:
    """A grid of signed numbers, red below and blue above 0, and bars for each of its rows unless they are all 0."""
    largest = _largest(z)
    figure = make_subplots(rows=1, cols=2, shared_yaxes=True, column_widths=[0.62, 0.38], horizontal_spacing=0.2)
    figure.add_trace(
        go.Heatmap(
            z=_known(z),
            x=list(x),
            y=list(y),
            zmin=-largest,
            zmax=largest,
            colorscale="RdBu",
            xgap=1,
            ygap=1,
            colorbar={"title": {"text": colour_title, "side": "right"}, "x": 0.52, "thickness": 14},
            hovertemplate="%{y} %{x}: %{z:.3g}<extra></extra>",
        ),
        row=1,
        col=1,
    )
    written = {name: values for name, values in bars_.items() if any(values)}
    for (name, values), colour in zip(written.items(), (CHOSEN, "#E69F00", *OTHER_COLOURS), strict=False):
        bar = go.Bar(
            x=list(values),
            y=list(y),
            name=name,
            orientation="h",
            showlegend=True,
            marker={"color": colour},
            hovertemplate=f"%{{y}} {html.escape(name)}: %{{x:.3g}}<extra></extra>",
        )
        figure.add_trace(bar, row=1, col=2)
    figure.update_xaxes(title_text=x_title, row=1, col=1, **_ticks(x, 420))
    figure.update_xaxes(title_text=colour_title, row=1, col=2)
    labelled = list(y)[:: math.ceil(len(y) / 32)]
    figure.update_yaxes(
        autorange="reversed", tickvals=labelled, ticktext=labelled, type="category", showticklabels=True
    )
    figure.update_yaxes(title_text=y_title, row=1, col=1)
    figure.update_layout(
        template=TEMPLATE,
        title=_title(title),
        width=1000,
        height=max(16 * min(len(y), 60), 240) + 220,
        margin={"t": 112},
        barmode="relative",
    )
    return figure


def bars(
    groups: Mapping[str, tuple[float, float, float]], *, title: str, y_title: str, notes: Mapping[str, str]
) -> go.Figure:
    """One bar per group, with its interval (value, low, high; NaN draws none) and a note under its name."""
    names = list(groups)
    values, low, high = np.array([groups[name] for name in names], dtype=float).T
    figure = go.Figure(
        go.Bar(
            x=[f"{html.escape(name)}<br>{html.escape(notes.get(name, ''))}" for name in names],
            y=values.tolist(),
            marker={"color": [class_colour(name, names) for name in names]},
            width=0.6,
            error_y={
                "type": "data",
                "symmetric": False,
                "array": high - values,  # arrays, in which NaN draws nothing; in lists it would draw an interval of 0
                "arrayminus": values - low,
            },
            hovertemplate="%{x}: %{y:.4g}<extra></extra>",
        )
    )
    figure.update_yaxes(title_text=y_title)
    figure.update_layout(template=TEMPLATE, title=_title(title), width=160 * max(len(names), 2) + 160, height=460)
    return figure


def table(
    columns: Mapping[str, Sequence[str]], *, title: str, shade: Sequence[Sequence[str]] | None = None
) -> go.Figure:
    """A table of texts; `shade` gives each column's cell colours. Texts must have gone through `visible`."""
    rows = len(next(iter(columns.values()), ()))
    figure = go.Figure(
        go.Table(
            header={
                "values": [f"<b>{html.escape(name)}</b>" for name in columns],
                "align": "left",
                "fill_color": "#EEEEEE",
            },
            cells={
                "values": [list(values) for values in columns.values()],
                "align": "left",
                "height": 26,
                "fill_color": [list(colours) for colours in shade] if shade else "white",
                "font": {"size": 12},
            },
        )
    )
    figure.update_layout(
        template=TEMPLATE,
        title=_title(title),
        width=min(130 * len(columns) + 60, 2400),
        height=27 * rows + 160,
        margin={"l": 20, "r": 20, "b": 20},
    )
    return figure


def page(title: str, sections: Sequence[tuple[str, str, go.Figure]]) -> str:
    """A self-contained HTML page: for each section its heading, a paragraph and a figure. All text is escaped."""
    parts = []
    for number, (heading, text, figure) in enumerate(sections):
        drawn = figure.to_html(full_html=False, include_plotlyjs=number == 0, div_id=f"figure-{number}")
        parts.append(f"<section><h2>{html.escape(heading)}</h2><p>{html.escape(text)}</p>{drawn}</section>")
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        f"<title>{html.escape(title)}</title>"
        "<style>body{font-family:Helvetica,Arial,sans-serif;color:#222;max-width:1080px;margin:2em auto;padding:0 1em}"
        "section{margin:2.5em 0;overflow-x:auto}p{max-width:46em;line-height:1.5;white-space:pre-line}</style></head>"
        f"<body><h1>{html.escape(title)}</h1>{''.join(parts)}</body></html>"
    )


def write_page(path: Path, title: str, sections: Sequence[tuple[str, str, go.Figure]]) -> None:
    """Write `page` whole or not at all."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.write_text(page(title, sections), encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
