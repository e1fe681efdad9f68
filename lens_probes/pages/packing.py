"""Results as data for the page: names, labels and texts as JSON, numbers as deflated base64 arrays.

Numbers are exact (float32, whole numbers) where there are few. Where there are many they are rounded to one of 65,534
even steps between their smallest and largest value, and attention and others of which there are most to one of 254:
less than the eye can tell on a colour scale. Each head or unit has steps of its own. The page says so beside what is
rounded.

Where all heads or units would be too many numbers, such as attention in a text of 1,500 tokens, the page holds some of
them and says which.
"""

import base64
import inspect
import math
import zlib
from collections.abc import Sequence
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from jaxtyping import Float64, Int, Shaped

from lens_probes.messages import brief
from lens_probes.result import PairResult, Result, Shown
from lens_probes.result.tokens import LayerTokenResult, WordResult
from lens_probes.text.prompts import PairTable, PromptTable, Table, Tokens

EXACT = 2**13  # numbers of a quantity that are sent as they are
MOST = 2**18  # numbers of a quantity that are drawn at all,
MOST_OF_TOKENS = 2**20  # of one that has a number per token,
MOST_OF_UNITS = 2**15  # or per token and unit,
MOST_PAIRS = 3 * 2**20  # and of one that has an axis of these:
COARSE = {"pair", "other_prompt", "dimension", "sample"}
UNLABELLED = {"k", "dimension", "sample", "bin", "edge", "example", "window"}  # axes that are drawn by number
OF_LAYER = ("head", "unit")  # axes of which some are left out where all would be too many
OWN_STEPS = 64  # numbers per head or unit, or more, have steps of their own

Packed = dict[str, Any]
Keep = Sequence[tuple[int | str, int | str]]
Cells = Int[np.ndarray, "cell layer_and_head"]


def packed(results: Result | Sequence[Result], title: str = "", *, keep: Keep = ()) -> Packed:
    """Results as JSON-able data: what the page shows of them, and nothing else.

    Results of the same prompts share their tokens, and so one selection on the page. `keep`: (layer, head) or (layer,
    unit) pairs that are shown even where all would be too many.

    >>> import lens_probes as lp
    >>> data = packed(lp.RankShift().run(lp.tiny.bridge(), "Time flies like an arrow."))
    >>> [each["name"] for each in data["results"][0]["quantities"]][:3]
    ['rank', 'score', 'norm']
    """
    asked = [results] if isinstance(results, Result) else list(results)
    for each in asked:
        if not isinstance(each, Result):
            raise TypeError(f"a page must be of results; got {brief(each)}: pass what run returned")
    if not asked:
        raise ValueError("a page must have a result or more; got none: pass what run returned")
    for pair in keep:
        if not any(_indices(each, pair) for each in asked):
            raise ValueError(f"keep must be (layer, head) or (layer, unit) pairs of the results; got {brief(pair)}")
    texts = _texts([table for each in asked for table in _token_tables(each).values()])
    models = dict.fromkeys(each.provenance.model for each in asked if each.provenance.model)
    return {
        "format": 1,
        "title": title or f"lens_probes on {', '.join(models) or 'a model'}",
        "texts": [_tokens(table) for table in texts],
        "results": [_result(each, texts, keep) for each in asked],
    }


# Results


def _result(result: Result, texts: Sequence[Tokens], keep: Keep) -> Packed:
    by, kind = result.provenance, type(result)
    every, shown, left_out = result.shown(), {}, []
    large = [name for name, each in every.items() if _is_large(each, every) and not _bare(result, each)]
    cells = _cells(result, every, large, keep)
    for name, each in (_only(every, large, cells) if large else every).items():
        refused = _refused(result, each, every[name].values.size)
        if refused:
            left_out.append(f"{name} [{' '.join(each.axes)}]: {refused}")
        else:
            shown[name] = each
    card = (inspect.getmodule(kind).__doc__ or "").strip()  # pyright: ignore[reportOptionalMemberAccess]
    question = card.splitlines()[0].split(": ", 1)[-1] if card else ""
    return {
        "name": kind.__name__.removesuffix("Result"),
        "question": f"{question[:1].upper()}{question[1:]}",
        "probe": by.probe,
        "conditions": result.conditions(),
        "run": by.describe() if by.model else "",
        "settings": {
            "class of the model": by.model_class,
            "reads": ", ".join(by.hooks),
            "versions": ", ".join(f"{package} {version}" for package, version in by.versions),
        },
        "findings": _findings(result),
        "labels": {axis: list(own) for axis in _axes(shown) if isinstance(own := result.labels(axis), tuple)},
        "tokens": {name: _rows(table, texts) for name, table in _token_tables(result).items()},
        "prompts": next((_prompts(table) for table in _tables(result, PromptTable).values()), None),
        "pairs": next((_pairs(table) for table in _tables(result, PairTable).values()), None),
        "vocab": _vocab(result, shown),
        "cells": cells.tolist(),
        "quantities": [
            _quantity(name, each, every[name].values.shape[:2], name in large) for name, each in shown.items()
        ],
        "classes": _classes(result),
        "left_out": left_out,
    }


_FOUND: WeakKeyDictionary[Result, list[str]] = WeakKeyDictionary()  # a finding may take many permutations


def _findings(result: Result) -> list[str]:
    if result not in _FOUND:
        _FOUND[result] = result.findings()
    return _FOUND[result]


def _refused(result: Result, shown: Shown, of_all: int) -> str:
    """Why a quantity is not drawn; empty if it is. `of_all`: its numbers with those of heads that are left out."""
    bare = _bare(result, shown)
    if bare:
        return f"no labels for {', '.join(bare)}"
    if shown.values.size > _most(shown.axes) or (of_all and not shown.values.size):
        return f"{of_all:,} numbers are too many for a page: run it with fewer prompts or layers"
    return ""


def _bare(result: Result, shown: Shown) -> list[str]:
    return [axis for axis in shown.axes if axis not in UNLABELLED and result.labels(axis) is None]


def _most(axes: Sequence[str]) -> int:
    if "token" in axes:
        return MOST_OF_UNITS if "unit" in axes else MOST_OF_TOKENS
    return MOST if COARSE.isdisjoint(axes) else MOST_PAIRS


# Some heads or units of many


def _is_large(each: Shown, every: dict[str, Shown]) -> bool:
    """Whether a quantity has too many numbers, but some of its heads or units would fit."""
    return _has_cells(each.axes) and math.prod(each.values.shape[:2]) * _per_cell(each, every) > _most(each.axes)


def _cells(result: Result, every: dict[str, Shown], large: Sequence[str], keep: Keep) -> Cells:
    """Layer and head (or unit) by index of what the page holds of these quantities.

    First those asked for, then those that the result names, then those with the largest numbers.
    """
    if not large:
        return np.empty((0, 2), dtype=np.int64)
    room = min(_most(every[name].axes) // _per_cell(every[name], every) for name in large)
    order = [*(cell for pair in keep for cell in _indices(result, pair)), *result.foremost()]
    values = every[large[0]].values
    size = np.nan_to_num(np.abs(values)).max(axis=tuple(range(2, values.ndim)))
    order += [divmod(int(cell), values.shape[1]) for cell in np.argsort(-size, axis=None, kind="stable")]
    return np.array(sorted(list(dict.fromkeys(order))[:room]), dtype=np.int64).reshape(-1, 2)


def _has_cells(axes: Sequence[str]) -> bool:
    """Whether a quantity has several numbers per layer and head (or unit)."""
    return len(axes) > 2 and axes[0] == "layer" and axes[1] in OF_LAYER


def _per_cell(each: Shown, every: dict[str, Shown]) -> int:
    """Numbers of a head or unit, together with those that they name: an example has a context."""
    named = [math.prod(other.values.shape[1:]) for other in every.values() if other.axes[:1] == (each.quantity.into,)]
    return math.prod(each.values.shape[2:]) * max(named, default=1)


def _indices(result: Result, pair: Any) -> list[tuple[int, int]]:
    """A layer and a head (or unit) by index, if this result has them."""
    for axis in OF_LAYER:
        with suppress(ValueError, TypeError):
            layer, other = pair
            return [(result.index_of("layer", layer), result.index_of(axis, other))]
    return []


def _only(every: dict[str, Shown], large: Sequence[str], cells: Cells) -> dict[str, Shown]:
    """Of large quantities the numbers of these cells, one row per cell, and of examples those that are still named."""
    held = dict(every)
    for name in large:
        held[name] = every[name]._replace(values=every[name].values[tuple(cells.T)])
    named = [each.values for each in held.values() if each.quantity.into == "example"]
    rows = np.unique(np.concatenate([each[np.isfinite(each)] for each in named])) if named else np.empty(0)
    for name, each in held.items():
        if each.quantity.into == "example":
            place = np.searchsorted(rows, each.values).astype(np.float64)
            held[name] = each._replace(values=np.where(np.isfinite(each.values), place, np.nan))
        elif each.axes[:1] == ("example",):
            held[name] = each._replace(values=each.values[rows.astype(np.int64)])
    return held


# Labels and quantities


def _axes(shown: dict[str, Shown]) -> list[str]:
    axes = [axis.removeprefix("other_") for each in shown.values() for axis in each.axes]
    return list(dict.fromkeys(["layer", *axes]))


def _tables(result: Result, kind: type[Table]) -> dict[str, Any]:
    """The label tables of a kind by field."""
    return {name: table for name, table in vars(result).items() if type(table) is kind and len(table)}


def _token_tables(result: Result) -> dict[str, Tokens]:
    """The tokens of a result, and those that are looked at where they are others."""
    tables = {name: table for name, table in _tables(result, Tokens).items() if name == "token"}
    if isinstance(result, PairResult) and result.keys() is not result.token:
        tables["key"] = result.keys()
    return tables


def _quantity(name: str, shown: Shown, first: tuple[int, ...], in_cells: bool) -> Packed:
    """A quantity. `first`: the sizes of its first two axes; `in_cells`: its values have one row per cell instead."""
    quantity, axes, values = shown
    groups = (len(values) if in_cells else math.prod(first)) if _has_cells(axes) else 1
    symmetric = (
        len(axes) > 1
        and axes[-1] == f"other_{axes[-2]}"
        and np.array_equal(values, values.swapaxes(-1, -2), equal_nan=True)
    )
    shape = [*first, *values.shape[1:]] if in_cells else list(values.shape)
    if symmetric:
        values = values[..., *np.tril_indices(values.shape[-1])]
    return {
        "name": name,
        "says": quantity.says,
        "unit": quantity.unit,
        "title": quantity.title,
        "low": quantity.low if math.isfinite(quantity.low) else None,
        "high": quantity.high if math.isfinite(quantity.high) else None,
        "null": quantity.null,
        "into": quantity.into,
        "low_on_top": quantity.low_on_top,
        "logarithmic": quantity.logarithmic,
        "axes": list(axes),
        "shape": shape,
        "in_cells": in_cells,
        "symmetric": symmetric,
        "values": numbers(
            values,
            coarse=not quantity.into and not COARSE.isdisjoint(axes),
            groups=groups if values.size >= groups * OWN_STEPS else 1,
        ),
    }


def _vocab(result: Result, shown: dict[str, Shown]) -> dict[str, str]:
    """The texts of the vocabulary entries that are shown, by id."""
    texts: Any = getattr(result, "vocab", {})
    drawn = [each.values for each in shown.values() if each.quantity.into == "vocab"]
    ids = {int(i) for values in drawn for i in np.unique(values[np.isfinite(values)])}
    return {str(i): texts[i] for i in sorted(ids) if isinstance(texts, tuple) or i in texts}


def _classes(result: Result) -> list[Packed]:
    """Medians by word class with their intervals: over layers, or one per class."""
    if not isinstance(result, WordResult) or not hasattr(result, "by_word_class"):
        return []
    try:
        table = result.by_word_class()  # pyright: ignore[reportAttributeAccessIssue]
    except ValueError:  # no token of this run belongs to a word
        return []
    over_layers = isinstance(result, LayerTokenResult)
    return [
        {
            "quantity": quantity,
            "title": result.quantity(quantity).title,
            "null": result.quantity(quantity).null,
            "low_on_top": result.quantity(quantity).low_on_top,
            "logarithmic": result.quantity(quantity).logarithmic,
            "word_class": word_class,
            "n": int(rows["words" if "words" in rows else "types"].max()),
            "layers": over_layers,
            **{name: _plain(rows[name]) for name in ("median", "low", "high")},
        }
        for (quantity, word_class), rows in table.groupby(["quantity", "word_class"], sort=False, observed=True)
    ]


def _plain(values: Any) -> list[float | None]:
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values]


# Texts and labels


def _texts(tables: Sequence[Tokens]) -> list[Tokens]:
    """The distinct tables of tokens; one that is a part of another stands in it."""
    distinct: list[Tokens] = []
    for table in sorted(tables, key=len, reverse=True):
        if not any(_places(table).items() <= _places(other).items() for other in distinct):
            distinct.append(table)
    order = {id(table): number for number, table in enumerate(tables)}
    return sorted(distinct, key=lambda table: order[id(table)])


def _places(table: Tokens) -> dict[tuple[int, int], tuple[int, str]]:
    places = zip(table.prompt.tolist(), table.position.tolist(), strict=True)
    return dict(zip(places, zip(table.id.tolist(), table.text, strict=True), strict=True))


def _rows(table: Tokens, texts: Sequence[Tokens]) -> Packed:
    """Which table of the page a result's tokens stand in, and which of its rows they are (None: all)."""
    own = _places(table)
    number = next(n for n, other in enumerate(texts) if own.items() <= _places(other).items())
    if len(table) == len(texts[number]):
        return {"text": number, "rows": None}
    row_of = {place: row for row, place in enumerate(_places(texts[number]))}
    return {"text": number, "rows": [row_of[place] for place in own]}


def _tokens(table: Tokens) -> Packed:
    return {
        "prompt": table.prompt.tolist(),
        "position": table.position.tolist(),
        "id": table.id.tolist(),
        "text": list(table.text),
        "word_class": list(table.word_class),
        "special": table.special.int().tolist(),
        "topic": list(table.topic),
    }


def _prompts(table: PromptTable) -> Packed:
    return {"text": list(table.text), "topic": list(table.topic)}


def _pairs(table: PairTable) -> Packed:
    return {name: numbers(getattr(table, name).double().numpy()) for name in ("prompt", "query", "key")}


# Numbers


def numbers(values: Float64[np.ndarray, "..."], *, coarse: bool = False, groups: int = 1) -> Packed:
    """An array as base64 of deflated little-endian numbers; `low + step * code` where it is rounded.

    `groups`: parts of equal size, one after the other, each with its own `low` and `step`.

    >>> packed_numbers = numbers(np.array([1.0, 2.0, np.nan]))
    >>> packed_numbers["type"], packed_numbers["missing"]
    ('uint16', 65535)
    """
    values = np.atleast_1d(values)
    known = values[np.isfinite(values)]
    if not coarse and not np.isinf(values).any() and (known == np.round(known)).all() and (np.abs(known) < 2**31).all():
        small = not len(known) or (known.min() >= 0 and known.max() < 65535)
        kind, missing = ("uint16", 65535) if small else ("int32", -(2**31))
        return {"type": kind, "data": _base64(np.nan_to_num(values, nan=missing), kind), "missing": missing}
    if not coarse and values.size <= EXACT:
        return {"type": "float32", "data": _base64(values, "float32")}
    kind, missing = ("uint8", 255) if coarse else ("uint16", 65535)
    rows = values.reshape(groups, -1)
    finite = np.isfinite(rows)
    low = np.where(finite, rows, np.inf).min(axis=1, initial=np.inf)
    high = np.where(finite, rows, -np.inf).max(axis=1, initial=-np.inf)
    low, high = (np.where(np.isfinite(bound), bound, 0.0)[:, None] for bound in (low, high))
    step = (high - low) / (missing - 1)
    step[step == 0] = 1.0
    codes = np.where(finite, np.round((rows - low) / step), missing)
    steps = {"low": low[:, 0].tolist(), "step": step[:, 0].tolist()}
    return {"type": kind, "data": _base64(codes, kind), "missing": missing, **steps}


def _base64(values: Shaped[np.ndarray, "..."], kind: str) -> str:
    return base64.b64encode(zlib.compress(values.astype(np.dtype(kind).newbyteorder("<")).tobytes())).decode()
