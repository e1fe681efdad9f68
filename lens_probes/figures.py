"""The only file that builds Plotly figures: lines with bands, labelled paths, heatmaps, bars and tables.

Colours mean word classes, the same everywhere. Token text goes through `visible`: spaces and control characters are
shown, and nothing in it can act as HTML (Plotly reads a part of HTML in every label). Every picture goes through
`_finish`, which fits title, labels and margins to its size. Labels stand in the traces wherever they can, so that
traces can be copied into the panels of another figure.
"""

import html
import math
import textwrap
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any, NamedTuple, TypedDict, Unpack

import numpy as np
import pandas as pd
import plotly.express as px
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lens_probes.messages import amount, brief

# Colours of Okabe and Ito, and of Tol: told apart with colour-blind eyes too, and seen on white and on black.
CLASS_COLOURS = {
    "content": "#0072B2",
    "function": "#D55E00",
    "number": "#009E73",
    "punctuation": "#AA4499",
    "special": "#777777",
}
OTHER_COLOURS = ("#56B4E9", "#E69F00", "#117733", "#CC6677", "#999933")
Numbers = Sequence[float] | Sequence[int]
FEW_WORDS = 10
FEW_NAMES, SHORT = 14, 6
ROWS, COLUMNS = 60, 40  # of a heatmap: more cannot be read
SMALLEST = 200  # pixels
CHOSEN = "#0072B2"
GREY = "#9A9A9A"
INK = "#222222"
NO_BREAK = "\u00a0"


class Look(TypedDict, total=False):
    """What every figure method takes: a size in pixels, and a Plotly template or its name, such as "plotly_dark"."""

    width: int
    height: int
    template: str | go.layout.Template


_AXIS = {"showline": True, "linecolor": INK, "ticks": "outside", "gridcolor": "#EEEEEE", "zeroline": False}
TEMPLATE = go.layout.Template(
    layout=go.Layout(
        font={"family": "Helvetica, Arial, sans-serif", "size": 13, "color": INK},
        paper_bgcolor="white",
        plot_bgcolor="white",
        xaxis=_AXIS,
        yaxis=_AXIS,
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


def quoted(text: str) -> str:
    """Token text in a title: in quotes, with spaces as spaces, at which no line ends.

    >>> quoted(" a") == "'\\u00a0a'", quoted("\\u00a0")
    (True, "'·'")
    """
    return f"'{' '.join(map(spelled, text.split(' ')))}'".replace(" ", NO_BREAK)


def _seen(character: str) -> str:
    if character in "\n\t":
        return "⏎" if character == "\n" else "⇥"
    category = unicodedata.category(character)
    if category == "Zs":  # no-break, ideographic and thin spaces too
        return "·"
    return f"\\u{ord(character):04x}" if category in ("Cc", "Cf", "Zl", "Zp", "Co", "Cn", "Cs") else character


def class_colour(name: str, among: Sequence[str]) -> str:
    """The colour of a word class; classes of the user's own get the next free one."""
    own = [each for each in among if each not in CLASS_COLOURS]
    return CLASS_COLOURS[name] if name in CLASS_COLOURS else OTHER_COLOURS[own.index(name) % len(OTHER_COLOURS)]


def layer_title(layers: Sequence[str]) -> str:
    """The title of a layer axis: labels such as 3_post say where a state is read.

    >>> layer_title(["0", "1"]), layer_title(["0_pre", "0_post"])
    ('layer', 'layer (read point)')
    """
    return "layer" if all(map(str.isdigit, layers)) else "layer (read point)"


@dataclass(frozen=True)
class Line:
    """One line of a panel: its points, the band around them if it has one, and how it looks."""

    name: str
    y: Numbers
    low: Numbers | None = None
    high: Numbers | None = None
    colour: str = CHOSEN
    dashed: bool = False


def shown_classes(table: pd.DataFrame) -> list[str]:
    """The word classes of a table that have enough words for a line of their own; all of them if none has."""
    classes = list(dict.fromkeys(table["word_class"]))
    large = set(table.loc[table["words"] >= FEW_WORDS, "word_class"])
    return [each for each in classes if each in large] or classes


def class_lines(table: pd.DataFrame, quantity: str, classes: Sequence[str]) -> list[Line]:
    """The median of a quantity over layers with its interval, one line per word class, from a table by word class."""
    drawn = []
    for word_class in classes:
        rows = table[(table["quantity"] == quantity) & (table["word_class"] == word_class)]
        if len(rows):
            name = f"{word_class} ({amount(max(rows['words']), 'word')})"
            colour = class_colour(word_class, classes)
            drawn.append(Line(name, list(rows["median"]), list(rows["low"]), list(rows["high"]), colour))
    return drawn


# The last step of every picture


def _asked(look: Look, name: str, default: int | float) -> int:
    """A size that was asked for, or this one; raises for what is no look."""
    for other in look:
        if other not in Look.__annotations__:
            raise TypeError(f"a figure takes the options {', '.join(Look.__annotations__)}; got {other}")
    pixels = look.get(name, max(round(default), SMALLEST))
    if isinstance(pixels, bool) or not isinstance(pixels, int | np.integer) or pixels < SMALLEST:
        raise ValueError(
            f"figure({name}=...) must be a whole number of pixels, {SMALLEST} or more; got {brief(pixels)}"
        )
    return int(pixels)


def _finish(
    figure: go.Figure,
    title: str,
    look: Look,
    *,
    width: int | float,
    height: int | float,
    left: int | float = 70,
    right: int | float = 30,
    above: int | float = 0,
    below: int | float = 62,
) -> go.Figure:
    """Fit title, labels and legend to the size: `width` pixels in all and `height` for the plots, if `look` has none.

    `left`, `right` and `below` are the margins without long labels; `above` is the room for names of panels.
    """
    wide = _asked(look, "width", width)
    text, top = _title(title, wide - 30)
    traces: Any = figure.data
    coloured = [trace for trace in traces if trace.type == "heatmap" and trace.showscale is not False]
    right = max(right, 112) if coloured else right
    down = [axis for axis in figure.select_yaxes() if axis.categoryarray]
    left = max([left, *(50 + 6.6 * _longest(axis.categoryarray) for axis in down)])
    left = min(left, wide / 3)
    across = wide - left - right
    below += max([_fit_across(axis, across * _span(axis)) for axis in figure.select_xaxes()], default=0)
    legend = [len(html.unescape(trace.name)) * 7 + 48 for trace in traces if getattr(trace, "showlegend", None)]
    rows = math.ceil(len(legend) / max(1, (wide - 20) // max(legend))) if sum(legend) > wide - 20 else bool(legend)
    top, below = top + above, below + 19 * rows + 6 * bool(rows)
    tall = _asked(look, "height", top + height + below)
    squeezed = min(1.0, (tall - 100) / (top + below))  # a low figure still has a plot
    top, below = top * squeezed, below * squeezed
    for axis in figure.select_yaxes():
        length = (tall - top - below) * _span(axis)
        axis.title.text = _broken(axis.title.text, length)
        if axis.categoryarray:
            axis.tickvals = _thinned(axis.categoryarray, length / 14)
    for trace in coloured:
        scale, length = trace.colorbar, max(1, tall - top - below)
        scale.title.text = _broken(scale.title.text, length)
        scale.update(title_font_size=13, tickfont_size=11)
        if scale.tickvals:
            kept = _apart_by(scale.tickvals, 14 * (trace.zmax - trace.zmin) / length)
            scale.update(tickvals=[scale.tickvals[i] for i in kept], ticktext=[scale.ticktext[i] for i in kept])
    figure.update_layout(
        width=wide,
        height=tall,
        title={"text": text, "x": 16 / wide, "y": 1 - 28 / tall, "xanchor": "left", "yanchor": "top"},
        title_font_size=16,
        margin={"l": left, "r": right, "t": top, "b": below},
        legend={"orientation": "h", "traceorder": "normal", "x": 0, "y": 0, "yanchor": "bottom"},
        legend_xref="container",
        legend_yref="container",
        hoverlabel={"font": {"family": "Menlo, Consolas, monospace"}},
    )
    figure.update_xaxes(title_font_size=13, title_standoff=8)
    figure.update_yaxes(title_font_size=13, title_standoff=8, tickfont_size=11, automargin=True)
    try:
        return figure.update_layout(template=look.get("template", TEMPLATE))
    except ValueError:
        raise ValueError(
            f"figure(template=...) must be a Plotly template or the name of one, such as 'plotly_dark'; got "
            f"{brief(look.get('template'))}"
        ) from None


def _title(title: str, width: int | float) -> tuple[str, int]:
    """A title whose second and later lines are smaller, broken at this width, and the room that it needs."""
    first, *rest = title.split("\n")
    large = [f"<b>{line}</b>" for line in _lines(first, width / 9)]
    small = [f"<span style='font-size:12px'>{line}</span>" for part in rest for line in _lines(part, width / 6.4)]
    return "<br>".join([*large, *small]), 34 + 21 * len(large) + 16 * len(small)


def _lines(text: str, longest: int | float) -> list[str]:
    """A text broken into lines, escaped. Wide characters count twice; the no-break spaces of `quoted` become spaces."""
    padded = "".join(f"{each}\0" if unicodedata.east_asian_width(each) in "WF" else each for each in text)
    lines = textwrap.wrap(padded, max(8, int(longest)), break_on_hyphens=False)
    return [html.escape(line.replace("\0", "").replace(NO_BREAK, " "), quote=False) for line in lines]


def _broken(title: str | None, length: int | float) -> str | None:
    """The title of an axis or a colour bar, broken where it is longer than its axis; unit and range stay together."""
    if not title:
        return title
    longest, text = max(length, 100) / 6.8, html.unescape(title)
    what, bracket, unit = text.rpartition(" (")
    if what and len(unit) < longest:
        text = f"{what}{bracket}{unit.replace(' ', NO_BREAK)}"
    return "<br>".join(_lines(text, longest))


def _span(axis: Any) -> float:
    """The part of a figure's plots that an axis takes up."""
    low, high = axis.domain or (0.0, 1.0)
    return high - low


def _longest(labels: Iterable[str]) -> int:
    """The number of characters in the longest line of some labels."""
    return max((len(line) for label in labels for line in html.unescape(label).split("<br>")), default=0)


def _thinned(labels: Sequence[str], room: int | float) -> list[str]:
    """As many labels as there is room for, beginning with the first."""
    return list(labels)[:: math.ceil(len(labels) / max(1, int(room)))]


def _fit_across(axis: Any, length: int | float) -> float:
    """Write out as many labels of a horizontal axis as fit, at a slant if they are few and long; the room below it."""
    if axis.title.text is not None:
        axis.title.text = _broken(axis.title.text, length)
    below = 16.0 * (axis.title.text or "").count("<br>")
    labels = axis.categoryarray or ()
    longest = _longest(labels)
    if labels and axis.tickangle is None:
        room = length / (7.5 * longest + 12)
        axis.tickangle = 0 if len(labels) <= room or len(labels) > FEW_NAMES or longest < SHORT else -40
        if not axis.tickangle:
            axis.tickvals = _thinned(labels, room)
            return below + 15 * max((label.count("<br>") for label in labels), default=0)
    if labels:
        axis.tickvals = _thinned(labels, length / 16)
    return below + 6.2 * longest * abs(math.sin(math.radians(axis.tickangle or 0)))


def _labelled(labels: Sequence[str]) -> dict[str, Any]:
    """An axis of labels in their order, of which `_finish` writes out as many as fit."""
    return {"type": "category", "categoryorder": "array", "categoryarray": _apart(labels)}


def _apart(labels: Iterable[str]) -> list[str]:
    """The labels, with a number behind one that comes again: equal ones would be drawn in one place.

    >>> _apart(["a", "b", "a"])
    ['a', 'b', 'a (2)']
    """
    apart: dict[str, None] = {}
    for label in labels:
        again = (f"{label} ({n})" for n in range(2, len(apart) + 2))
        apart[label if label not in apart else next(each for each in again if each not in apart)] = None
    return list(apart)


def _apart_by(ticks: Numbers, least: int | float) -> list[int]:
    """The numbers of ticks that have at least this distance, from the first on.

    >>> _apart_by([0, 1, 2, 5], 2)
    [0, 2, 3]
    """
    kept = [0]
    for number, tick in enumerate(ticks):
        if tick - ticks[kept[-1]] >= least:
            kept.append(number)
    return kept


def _round_numbers(low: int | float, high: int | float) -> list[float]:
    """Ticks of a logarithmic axis: powers of ten, and 2 and 5 times these where there are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    digits = (1, 2, 5) if last - first <= 3 else (1,)
    every = [digit * 10.0**n for n in range(first, last + 1) for digit in digits]
    return [tick for tick in every if low <= tick <= high]


def _scale(values: Iterable[int | float], logarithmic: bool) -> dict[str, Any]:
    """A linear axis, or a logarithmic one whose ticks are whole numbers written out."""
    known = [value for value in values if value > 0 and math.isfinite(value)]
    if not logarithmic:
        return {}
    ticks = _round_numbers(0.8 * min(known), 1.25 * max(known)) if known else []
    return {"type": "log", **({"tickvals": ticks, "ticktext": [f"{t:,.12g}" for t in ticks]} if len(ticks) > 1 else {})}


# Kinds of pictures


def lines(
    panels: Mapping[str, Sequence[Line]],
    x: Sequence[str],
    *,
    title: str,
    x_title: str,
    upside_down: Sequence[str] = (),
    logarithmic: Sequence[str] = (),
    **look: Unpack[Look],
) -> go.Figure:
    """Panels side by side, each with its y title as key; lines of one name share a colour and a legend entry.

    `upside_down` names the panels whose small values stand on top, `logarithmic` those with a logarithmic axis. Panels
    for which there is no room stand below.
    """
    width = min(480, 1080 // len(panels)) * len(panels) + 60
    columns = max(1, min(len(panels), _asked(look, "width", width) // 270))
    rows = math.ceil(len(panels) / columns)
    figure = make_subplots(rows, columns, horizontal_spacing=0.24 / columns, vertical_spacing=0.25 / rows)
    shown: set[str] = set()
    for number, (y_title, drawn) in enumerate(panels.items()):
        place: Any = {"row": number // columns + 1, "col": number % columns + 1}
        for line in drawn:
            name = html.escape(line.name, quote=False)
            figure.add_trace(
                go.Scatter(
                    x=list(x),
                    y=[math.nan if y_title in logarithmic and y <= 0 else y for y in line.y],  # has no place there
                    name=name,
                    legendgroup=name,
                    showlegend=name not in shown,
                    mode=_mode(line.y),
                    line={"color": line.colour, **({"width": 1.6, "dash": "dash"} if line.dashed else {"width": 2.4})},
                    hovertemplate="%{fullData.name}<br>%{x}: %{y:.4g}<extra></extra>",
                ),
                **place,
            )
            shown.add(name)
            band = _band(line, x)
            if band.x:
                figure.add_trace(band.update(legendgroup=name), **place)
        figure.update_xaxes(title_text=x_title, **_labelled(x), **place)
        figure.update_yaxes(
            title_text=y_title,
            autorange="reversed" if y_title in upside_down else True,
            **_scale((value for line in drawn for value in line.y), y_title in logarithmic),
            **place,
        )
    return _finish(figure, title, look, width=width, height=300 * rows + 20)


def _band(line: Line, x: Sequence[str]) -> go.Scatter:
    """The area between low and high, without the points where there is no interval."""
    known = [
        (label, low, high)
        for label, low, high in zip(x, line.low or (), line.high or (), strict=False)
        if math.isfinite(low) and math.isfinite(high)
    ]
    return go.Scatter(
        x=[label for label, _, _ in known] + [label for label, _, _ in reversed(known)],
        y=[high for _, _, high in known] + [low for _, low, _ in reversed(known)],
        mode="lines",
        fill="toself",
        fillcolor=_faint(line.colour, 0.15),
        line={"width": 0},
        showlegend=False,
        hoverinfo="skip",
    )


def _mode(y: Numbers) -> str:
    """A line, with points where one of them may have no neighbour."""
    return "lines" if len(y) > 2 and all(map(math.isfinite, y)) else "lines+markers"


def _faint(colour: str, opacity: int | float) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity:.2f})"


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
    **look: Unpack[Look],
) -> go.Figure:
    """One line per token in the colour of its group, one of them bold, labels where they end if there is room."""
    right = min(150, _asked(look, "width", 860) // 4)
    height = 400 if "height" not in look else _asked(look, "height", 0) - 170
    ends = dict(_room(tokens, bold, max(2, height // 16)))
    figure = go.Figure()
    for i in [*(i for i in range(len(tokens)) if i != bold), bold]:  # the bold one last, on top
        token, own = tokens[i], visible(tokens[i].text, max(4, right // 8 - 1))
        opacity = 1.0 if i == bold else max(0.25, min(0.7, 12 / len(tokens)))
        colour = _faint(token.colour, opacity)
        label = f" <b>{own}</b>" if i == bold else f" {own}"
        figure.add_trace(
            go.Scatter(
                x=list(x),
                y=list(token.y),
                mode=f"{_mode(token.y)}{'+text' if i in ends else ''}",
                text=[label if ends.get(i) == n else "" for n in range(len(x))] if i in ends else None,
                textposition="middle right",
                textfont={"color": token.colour, "size": 14 if i == bold else 11},
                cliponaxis=False,
                line={"color": colour, "width": 4 if i == bold else 1},
                marker={"size": 5, "color": colour},
                showlegend=False,
                legendgroup=html.escape(token.group),
                name=f"{visible(token.text)}{html.escape(token.note)}",
                hovertemplate="%{fullData.name}<br>%{x}: %{y:.5g}<extra></extra>",
            )
        )
    for group, colour in dict.fromkeys((token.group, token.colour) for token in tokens):  # for the legend
        name, line = html.escape(group), {"color": colour, "width": 3}
        figure.add_scatter(x=[None], y=[None], mode="lines", name=name, legendgroup=name, line=line, showlegend=True)
    figure.update_xaxes(title_text=x_title, **_labelled(x))
    figure.update_yaxes(title_text=y_title, autorange="reversed" if upside_down else True)
    return _finish(figure, title, look, width=860, height=400, right=right)


def _room(tokens: Sequence[TokenPath], bold: int, labels: int = 24) -> list[tuple[int, int]]:
    """Which paths get a label, and where: the bold one, then those that end a label's height from those labelled."""
    ends = {i: end for i, token in enumerate(tokens) if (end := token.end) is not None}
    known = [y for token in tokens for y in token.y if math.isfinite(y)]
    height = (max(known) - min(known)) / labels if known else 0.0
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
    narrowest: int = 6,
    null: tuple[str, Numbers] | None = None,
    **look: Unpack[Look],
) -> go.Figure:
    """A grid of numbers, rows from the top, with a text in each cell; wide ones are thinned to every nth column.

    What is below `low` or above `high` has their colour; `signed`: red below and blue above 0. No column is narrower
    than `narrowest` pixels. `null`: the name and the numbers, one per row, of a last column that is set apart: what the
    others are compared with; its texts are the last of each row. `y`, `text` and `hover` must have gone through
    `visible` where they hold token text.
    """
    room = _asked(look, "width", 10_000) - 172 - 6.6 * _longest(y)
    step = math.ceil(len(x) / max(1, min(COLUMNS, room // narrowest)))
    kept = range((len(x) - 1) % step, len(x), step)  # the last column always
    name, beside = ("", [()] * len(z)) if null is None else (null[0], [[value] for value in null[1]])
    shown = _known([[*(row[i] for i in kept), *last] for row, last in zip(z, beside, strict=True)])
    columns = len(kept) + (null is not None)
    cell = (46 if text else 22) * columns
    cell_width = (_asked(look, "width", max(cell, 460) + 260) - 172 - 6.6 * _longest(y)) / columns
    rows = [[*(row[i] for i in kept), *row[len(x) :]] for row in text or ()]
    texts = [[_cut(each, max(2, cell_width // 5)) for each in row] for row in rows]
    size = min(10.0, cell_width / (0.62 * max(map(_longest, texts), default=1) or 1))
    x, y = _apart([*(x[i] for i in kept), *([name] if null else [])]), _apart(y)
    figure = go.Figure(
        go.Heatmap(
            **_cells(shown, logarithmic),
            x=x,
            y=y,
            **_colours(shown, colour_title, signed, low, high, logarithmic, not dark_is_high),
            text=texts if text and size >= 7 else None,
            texttemplate="%{text}" if text and size >= 7 else None,
            textfont={"size": size},
            hovertext=[[row[i] for i in kept] for row in hover] if hover else None,
            hoverinfo="text" if hover else None,
            hovertemplate=None if hover else _hover(x_title, y_title, "customdata" if logarithmic else "z"),
            xgap=1,
            ygap=1,
        )
    )
    figure.update_xaxes(title_text=x_title, showgrid=False, **_labelled(x))
    figure.update_yaxes(title_text=y_title, showgrid=False, autorange="reversed", **_labelled(y))
    if "template" not in look:
        figure.update_layout(plot_bgcolor="#E9E9E9")  # the colour of a missing value
    title = f"{title}; one column in {step}" if step > 1 else title
    figure = _finish(figure, title, look, width=max(cell, 460) + 260, height=max(18 * len(y), 240))
    if null is not None:
        border = {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "line": {"color": GREY, "width": 3}}
        figure.add_shape(x0=len(kept) - 0.5, x1=len(kept) - 0.5, **border)
        if x[-1] not in (ticks := list(figure.layout.xaxis.tickvals)):
            figure.update_xaxes(tickvals=[*ticks[:-1], x[-1]])
    return figure


def _hover(x_title: str, y_title: str, value: str = "z") -> str:
    return f"{y_title} %{{y}}, {x_title} %{{x}}: %{{{value}:.4g}}<extra></extra>"


def _cells(shown: list[list[int | float | None]], logarithmic: bool) -> dict[str, Any]:
    """The numbers of a grid; on a logarithmic scale their logarithms, and the numbers for the text on hovering."""
    if not logarithmic:
        return {"z": shown}
    return {"z": [[value and math.log10(value + 1) for value in row] for row in shown], "customdata": shown}


def _known(z: Sequence[Numbers]) -> list[list[int | float | None]]:
    """The numbers, with nothing where one is missing."""
    return [[value if math.isfinite(value) else None for value in row] for row in z]


def _colours(
    z: Iterable[Sequence[int | float | None]],
    title: str,
    signed: bool = False,
    low: int | float | None = None,
    high: int | float | None = None,
    logarithmic: bool = False,
    reverse: bool = False,
) -> dict[str, Any]:
    """The colours of a grid, between its own lowest and highest value unless bounds are given, and their bar."""
    known = [value for row in z for value in row if value is not None and math.isfinite(value)] or [0.0]
    if signed:
        high = (max(map(abs, known)) if high is None else high) or 1.0
        low = -high
    low, high = min(known) if low is None else low, max(known) if high is None else high
    ticks = {}
    if logarithmic:
        marks = [0.0, *(_round_numbers(max(high / 10_000, min(1.0, high / 100)), high) if high > 0 else ())]
        ticks = {"tickvals": [math.log10(tick + 1) for tick in marks], "ticktext": [f"{tick:,.12g}" for tick in marks]}
        low, high = math.log10(low + 1), math.log10(high + 1)
    return {
        "zmin": low,
        "zmax": high if high > low else low + 1,
        "colorscale": "RdBu" if signed else "Blues",
        "reversescale": reverse,
        "colorbar": {"title": {"text": title, "side": "right"}, **ticks},
    }


def blocks(z: Sequence[Numbers], columns: Sequence[str], rows: Sequence[str] | None, **drawn: Any) -> go.Figure:
    """A large grid whose columns (and rows, unless None) come in groups: a group's name at its middle, borders between.

    `columns` and `rows` name the group of each, those of one group side by side; `drawn` is what `small_grids` takes.
    """
    x, y = ([f"{named(name, 16)} {n}" for n, name in enumerate(names or ())] for names in (columns, rows))
    figure = small_grids([("", z)], x=x, y=y or [str(i) for i in range(len(z))], tokens=True, **drawn)
    for axis, groups, other in (("x", columns, "y"), ("y", rows or (), "x")):
        runs = [(name, len(list(run))) for name, run in groupby(groups)]
        starts = list(accumulate((size for _, size in runs), initial=0))
        if runs:
            middles = [start + (size - 1) / 2 for start, (_, size) in zip(starts, runs, strict=False)]
            figure.update_layout({f"{axis}axis": {"tickvals": middles, "ticktext": [named(n, 16) for n, _ in runs]}})
        for start in starts[1:-1]:
            edge = {f"{axis}0": start - 0.5, f"{axis}1": start - 0.5, f"{other}0": 0, f"{other}1": 1}
            figure.add_shape(type="line", **edge, **{f"{other}ref": "paper"}, line={"color": INK, "width": 1})
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
    low: int | float | None = None,
    high: int | float | None = None,
    dark_is_high: bool = True,
    logarithmic: bool = False,
    tokens: bool = False,
    text: Sequence[Sequence[Sequence[str]]] | None = None,
    **look: Unpack[Look],
) -> go.Figure:
    """Grids of numbers, one per panel, on one colour scale; `signed`: red below and blue above 0, as far as `high`.

    Names of panels must have gone through `named`, and labels through `visible`. `tokens`: the columns are tokens, with
    wide cells and their labels at a slant. `text`: what stands in each cell of each panel, where it fits.
    """
    x, y, cell = _apart(x), _apart(y), 30 if tokens else 38 if text else 9
    widest, tallest = (640, 640) if len(panels) == 1 else (420, 420) if tokens or text else (190, 270)
    wide, tall = (max(120, min(cell * len(x), widest)), max(120, min(cell * len(y), tallest)))
    most = (_asked(look, "width", 1200) - 170 - 6.6 * _longest(y)) // 120
    columns = max(1, int(min(5, len(panels), most)))
    rows = math.ceil(len(panels) / columns)
    width = max(columns * (wide + 14) + 190 + 6.6 * _longest(y), 600)
    panel = (_asked(look, "width", width) - 170 - 6.6 * _longest(y)) / columns
    figure = make_subplots(
        rows,
        columns,
        shared_xaxes=True,
        shared_yaxes=True,
        horizontal_spacing=0.1 / columns if columns > 1 else 0,
        vertical_spacing=36 / (rows * (tall + 36)),
        subplot_titles=[_cut(name, panel / 6.8) for name, _ in panels],
    )
    every = [row for _, z in panels for row in _known(z)]
    colours = _colours(every, colour_title, signed, low, high, logarithmic, not dark_is_high)
    hover = _hover(x_title, y_title, "customdata" if logarithmic else "z")
    longest = max((_longest(cells) for written in text or () for cells in written), default=1)
    size = min(10.0, panel / len(x) / (0.62 * max(longest, 1)))
    for number, (name, z) in enumerate(panels):
        row, column = number // columns + 1, number % columns + 1
        grid = go.Heatmap(
            **_cells(_known(z), logarithmic),
            x=x,
            y=y,
            name=name,
            showscale=not number,
            hovertemplate=hover,
            **({"text": text[number], "texttemplate": "%{text}", "textfont_size": size} if text and size >= 7 else {}),
            **colours,
        )
        figure.add_trace(grid, row=row, col=column)
        figure.update_xaxes(showticklabels=number + columns >= len(panels), row=row, col=column)
    figure.update_xaxes(**_labelled(x), showgrid=False, tickangle=-60 if tokens else None)
    figure.update_yaxes(autorange="reversed", **_labelled(y), showgrid=False)
    last = (len(panels) - 1) % columns + 1
    for column in range(1, last + 1) if len(x_title) < panel / 6.8 else [(last + 1) // 2]:
        figure.update_xaxes(title_text=x_title, row=rows, col=column)
    figure.update_yaxes(title_text=y_title, row=(rows + 1) // 2, col=1)
    figure.update_annotations(font_size=12)
    above = 20 if any(name for name, _ in panels) else 0
    return _finish(figure, title, look, width=width, height=rows * (tall + 36) - 36, above=above)


def _cut(name: str, longest: int | float) -> str:
    """An escaped name, cut to as many characters; a number is left as it is."""
    text = html.unescape(name)
    return (
        name
        if len(text) <= longest or text.lstrip("-")[:1].isdigit()
        else f"{html.escape(text[: max(1, int(longest) - 1)], quote=False)}…"
    )


def images(
    rows: Sequence[tuple[str, Sequence[tuple[str, np.ndarray]]]], *, title: str, **look: Unpack[Look]
) -> go.Figure:
    """Rows of pictures, each a name and its pictures with a caption: [height width 3] of numbers from 0 to 1.

    Names and captions must have gone through `named`.
    """
    columns, height, wide = max(len(pictures) for _, pictures in rows), 150, 170
    figure = make_subplots(
        len(rows),
        columns,
        horizontal_spacing=0.02,
        vertical_spacing=34 / (len(rows) * (height + 34)),
        subplot_titles=[
            pictures[column][0] if column < len(pictures) else "" for _, pictures in rows for column in range(columns)
        ],
    )
    figure.update_annotations(font_size=11)
    for row, (name, pictures) in enumerate(rows, start=1):
        for column, (caption, picture) in enumerate(pictures, start=1):
            drawn = px.imshow((picture.clip(0, 1) * 255).round().astype(np.uint8), binary_string=True).data[0]
            drawn.update(name=f"{name}, {caption}", hoverinfo="name", hovertemplate=None)
            figure.add_trace(drawn, row=row, col=column)
        figure.update_yaxes(title_text=name, row=row, col=1)
    figure.update_xaxes(showticklabels=False, ticks="", showline=False, showgrid=False, zeroline=False)
    figure.update_yaxes(showticklabels=False, ticks="", showline=False, showgrid=False, zeroline=False)
    for axis in figure.select_yaxes():
        axis.update(scaleanchor=axis.anchor, autorange="reversed", constrain="domain")
    height = len(rows) * (height + 34) - 34
    return _finish(figure, title, look, width=max(columns * wide + 120, 460), height=height, above=20, below=20)


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
    **look: Unpack[Look],
) -> go.Figure:
    """A grid of signed numbers, red below and blue above 0, and bars for each of its rows unless they are all 0."""
    written = {name: values for name, values in bars_.items() if any(values)}
    widths = [0.62, 0.38] if written else [1.0]
    figure = make_subplots(1, len(widths), shared_yaxes=True, column_widths=widths, horizontal_spacing=0.1)
    colours = _colours(z, colour_title, signed=True)
    hover = _hover(x_title, y_title)
    figure.add_heatmap(z=_known(z), x=list(x), y=list(y), xgap=1, ygap=1, hovertemplate=hover, **colours, row=1, col=1)
    for (name, values), colour in zip(written.items(), (CHOSEN, "#E69F00", *OTHER_COLOURS), strict=False):
        bar = go.Bar(
            x=list(values),
            y=list(y),
            name=html.escape(name),
            orientation="h",
            showlegend=True,
            marker={"color": colour},
            hovertemplate=f"{y_title} %{{y}}, %{{fullData.name}}: %{{x:.4g}}<extra></extra>",
        )
        figure.add_trace(bar, row=1, col=2)
        figure.update_xaxes(title_text=colour_title, row=1, col=2)
    figure.update_xaxes(title_text=x_title, showgrid=False, row=1, col=1, **_labelled(x))
    figure.update_yaxes(autorange="reversed", showgrid=False, showticklabels=True, **_labelled(y))
    figure.update_yaxes(title_text=y_title, row=1, col=1)
    figure.update_layout(barmode="relative")
    return _finish(figure, title, look, width=1000, height=max(16 * min(len(y), 60), 240))


def bars(
    groups: Mapping[str, tuple[float, float, float]],
    *,
    title: str,
    y_title: str,
    notes: Mapping[str, str],
    **look: Unpack[Look],
) -> go.Figure:
    """One bar per group, with its interval (value, low, high; NaN draws none) and a note under its name."""
    names = list(groups)
    values, low, high = np.array([groups[name] for name in names], dtype=float).T
    x = [f"{html.escape(name)}<br>{html.escape(notes.get(name, ''))}" for name in names]
    figure = go.Figure(
        go.Bar(
            x=x,
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
    figure.update_xaxes(**_labelled(x))
    figure.update_yaxes(title_text=y_title)
    return _finish(figure, title, look, width=160 * max(len(names), 2) + 160, height=320, below=36)


def table(
    columns: Mapping[str, Sequence[str]],
    *,
    title: str,
    shade: Sequence[Sequence[str]] | None = None,
    **look: Unpack[Look],
) -> go.Figure:
    """A table of texts, as many columns as there is room for; `shade` gives each column's cell colours.

    Texts must have gone through `visible`.
    """
    rows, width = len(next(iter(columns.values()), ())), min(130 * len(columns) + 60, 2400)
    room = (_asked(look, "width", width) - 40) // 115
    if room < len(columns):
        title = f"{title}; {room} of {len(columns)} columns"
        columns = dict(list(columns.items())[:room])
    figure = go.Figure(
        go.Table(
            header={
                "values": [f"<b>{html.escape(name)}</b>" for name in columns],
                "align": "left",
                "fill_color": "#EEEEEE",
                "font_color": INK,
            },
            cells={
                "values": [list(values) for values in columns.values()],
                "align": "left",
                "height": 26,
                "fill_color": [list(colours) for colours in shade] if shade else "white",
                "font": {"size": 12, "color": INK},
            },
        )
    )
    return _finish(figure, title, look, width=width, height=27 * rows + 40, left=20, right=20, below=20)


class Example(NamedTuple):
    """A place in a text: its value, and the texts before it, at it and after it, which have gone through `spelled`."""

    value: float
    before: str
    at: str
    after: str


def examples(
    rows: Sequence[Example],
    histogram: Numbers,
    edges: Numbers,
    *,
    title: str,
    value_title: str,
    **look: Unpack[Look],
) -> go.Figure:
    """Places in texts, the place itself bold, and below them how often each value occurs; a line at the lowest shown.

    `histogram` counts values between two `edges` each; bins are drawn equally wide. Leading and trailing bins without a
    value are left out.
    """
    figure = make_subplots(
        rows=2,
        cols=1,
        specs=[[{"type": "table"}], [{"type": "xy"}]],
        row_heights=[31 * len(rows) + 50, 200],
        vertical_spacing=60 / (31 * len(rows) + 310),
    )
    width = _asked(look, "width", 860)
    room = (width - 200) // 7  # letters

    def context(row: Example) -> str:
        n = max(1, (room - len(row.at)) // 2)
        before, after = (
            row.before if len(row.before) <= n else f"…{row.before[-n:]}",
            row.after if len(row.after) <= n else f"{row.after[:n]}…",
        )
        before, at, after = (html.escape(text, quote=False) for text in (before, row.at, after))
        return f"{before}<b>{at}</b>{after}"

    texts = [context(row) for row in rows]
    figure.add_trace(
        go.Table(
            columnwidth=[80, width - 170],
            header={
                "values": [f"<b>{value_title}</b>", "<b>context</b>"],
                "align": "left",
                "fill_color": "#EEEEEE",
                "font_color": INK,
            },
            cells={
                "values": [[f"{row.value:.4g}" for row in rows], texts],
                "align": "left",
                "height": 31,
                "fill_color": "white",
                "font": {"size": 12, "color": INK},
            },
        ),
        row=1,
        col=1,
    )
    counts, bounds = np.asarray(histogram, dtype=float), np.asarray(edges, dtype=float)
    used = np.flatnonzero(counts)
    first, last = (int(used[0]), int(used[-1])) if len(used) else (0, len(counts) - 1)
    places = np.arange(first, last + 1)
    figure.add_trace(
        go.Bar(
            x=places.tolist(),
            y=counts[places].tolist(),
            marker_color=OTHER_COLOURS[0],
            customdata=[[f"{bounds[i]:.4g}", f"{bounds[i + 1]:.4g}"] for i in places],
            hovertemplate="%{customdata[0]} to %{customdata[1]}: %{y:,}<extra></extra>",
        ),
        row=2,
        col=1,
    )
    if rows:
        lowest = float(np.searchsorted(bounds, min(row.value for row in rows), side="right") - 1)
        at = min(lowest, last) - 0.5
        dashed = {"color": CHOSEN, "dash": "dash"}
        figure.add_shape(type="line", xref="x", yref="y domain", x0=at, x1=at, y0=0, y1=1, line=dashed)
    ticks = places[:: max(1, len(places) // 8)]
    figure.update_xaxes(
        title_text=f"{value_title} (dashed: the lowest shown)",
        tickvals=(ticks - 0.5).tolist(),
        ticktext=[f"{bounds[i]:.3g}" for i in ticks],
    )
    figure.update_yaxes(title_text="tokens", type="log")
    figure.update_layout(showlegend=False, bargap=0.05)
    return _finish(figure, title, look, width=860, height=31 * len(rows) + 310, left=70, right=20)
