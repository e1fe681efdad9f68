"""Results: typed tensors with their labels. Tables, figures, files and merging all follow from the declarations."""

import dataclasses
import hashlib
import html
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar, Unpack

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Float64
from torch import Tensor

from lens_probes import figures
from lens_probes.messages import brief
from lens_probes.result import files
from lens_probes.result.merging import merged_fields
from lens_probes.result.provenance import Provenance
from lens_probes.result.schema import Declared, Quantity, schema
from lens_probes.text.prompts import PromptTable, Table, Tokens, is_whole

if TYPE_CHECKING:
    import xarray as xr

R = TypeVar("R", bound="Result")


class Shown(NamedTuple):
    """A quantity as the page draws it: what its numbers are, their axes, and the numbers, NaN where one is missing."""

    quantity: Quantity
    axes: tuple[str, ...]
    values: Float64[np.ndarray, "..."]


class Result(Declared):
    """What a probe returns: typed tensors on the CPU, the labels of their axes, and their provenance.

    Subclass it, or one of its relatives in `lens_probes.result.tokens`, and declare each quantity with `measured`,
    `summed` or `derived`. `headline` names the quantity of tables and figures where none is named; by
    default it is the first that is no sum.
    """

    headline: ClassVar[str] = ""
    provenance: Provenance = dataclasses.field(default_factory=Provenance)

    def __post_init__(self) -> None:
        sizes: dict[str, int] = {}
        for name, dims in schema(type(self)).axes.items():
            tensor = getattr(self, name)
            if tensor is None:
                continue
            if tensor.device.type != "cpu" or tensor.ndim != len(dims):
                raise ValueError(
                    f"{type(self).__name__}.{name} must be [{' '.join(dims)}] on the CPU; got a tensor of shape "
                    f"{tuple(tensor.shape)} on {tensor.device}"
                )
            for axis, size in zip(dims, tensor.shape, strict=True):
                labels = self.labels(axis)
                expected = sizes.setdefault(axis, size if labels is None else len(labels))
                if size != expected:
                    raise ValueError(
                        f"{type(self).__name__}.{name} has {size} entries on axis {axis!r}, and the labels or another "
                        f"field have {expected}"
                    )

    # What it holds

    def labels(self, axis: str) -> Any:
        """The labels of an axis: the texts or the table of its name (`other_topic` is `topic` again), or None."""
        labels = getattr(self, axis.removeprefix("other_"), None)
        return labels if isinstance(labels, tuple | Table) else None

    def index_of(self, axis: str, asked: int | str) -> int:
        """Index of a layer, head or unit on its axis, by number or label: 6, "6" and "H6" are one head.

        A number is that of the first label that has it. An axis whose labels have no numbers has index 0 only.
        """
        labels = self.labels(axis)
        if not isinstance(labels, tuple) or not all(isinstance(label, str) for label in labels):
            raise ValueError(f"axis must be one with labels, such as layer; got {brief(axis)}")
        if isinstance(asked, str) and asked in labels:
            return labels.index(asked)
        number = int(asked) if isinstance(asked, str) and asked.isdecimal() else asked
        numbers = [int(digits) if (digits := re.sub(r"\D", "", label)) else 0 for label in labels]
        if not is_whole(number) or number not in numbers:
            known = ", ".join(labels) if len(labels) <= 12 else f"{labels[0]}, {labels[1]}, ..., {labels[-1]}"
            raise ValueError(f"{axis} must be one of {known}, by label or number; got {brief(asked)}")
        return numbers.index(number)

    def quantity(self, name: str) -> Quantity:
        """What a tensor's numbers are."""
        if name not in schema(type(self)).quantities:
            known = ", ".join(schema(type(self)).quantities)
            raise ValueError(f"a quantity of a {type(self).__name__} must be one of {known}; got {brief(name)}")
        return schema(type(self)).quantities[name]

    def known(self, name: str) -> Float64[np.ndarray, "..."]:
        """A quantity as float64, NaN where it is missing."""
        missing, tensor = self.quantity(name).missing, getattr(self, name)
        if tensor is None:
            raise ValueError(
                f"a quantity must be one that this run measured; got {name!r}, which "
                f"{self.provenance.probe or 'the settings of this run'} leaves out: run it with other settings"
            )
        return _known(tensor, missing)

    # The page

    def page(self, path: str | os.PathLike[str] | None = None) -> Any:
        """This result as an HTML page to click through, written to `path` if given; see `lens_probes.page`."""
        from lens_probes.pages import page  # the page stands above results

        return page([self], path)

    def shown(self) -> dict[str, Shown]:
        """What the page draws: every quantity of this run that is no sum, unless a result says otherwise."""
        shown: dict[str, Shown] = {}
        for name, axes in schema(type(self)).every.items():
            quantity = self.quantity(name)
            tensor = None if quantity.is_sum else getattr(self, name)  # a derived one is computed here
            if tensor is not None:
                shown[name] = Shown(quantity, axes, _known(tensor, quantity.missing))
        return shown

    def foremost(self) -> list[tuple[int, int]]:
        """Layers and heads (or units) by index that the page holds first where all would be too many."""
        return []

    def findings(self) -> list[str]:
        """What this result says, in sentences with n, interval and null; the page begins with them."""
        return []

    # Figures

    def figure(self, **look: Unpack[figures.Look]) -> go.Figure:
        """The first quantity: a grid of layers and heads, or a line over layers."""
        name = schema(type(self)).headline
        dims = schema(type(self)).every.get(name, ())
        title = self.title(self.quantity(name).heading)
        if len(dims) == 2 and dims[0] == "layer" and dims[1] in ("head", "kv_head", "unit"):
            return self.grid(name, title, **look)
        if dims == ("layer",):
            asked, drawn = self.quantity(name), [figures.Line("all tokens", self.known(name).tolist())]
            if asked.null:
                null = np.broadcast_to(self.known(asked.null), len(drawn[0].y)).tolist()
                drawn.append(figures.Line(self.quantity(asked.null).says, null, dashed=True))
            panels, layers = {asked.title: drawn}, self.labels("layer")
            return figures.lines(panels, layers, title=title, x_title=figures.layer_title(layers), **look)
        raise NotImplementedError(
            f"{type(self).__name__}.{name} [{' '.join(dims)}] has no figure of its own: write figure()"
        )

    def grid(self, name: str, title: str, **look: Unpack[figures.Look]) -> go.Figure:
        """A quantity by layer and head (or key/value head, or unit), and beside it its null, if it has one."""
        (_, across), asked, null = schema(type(self)).every[name], self.quantity(name), None
        if asked.null:
            null = "null", self.known(asked.null)
            title = f"{title}\nnull: {self.quantity(asked.null).says}"
        return self.draw_grid(self.known(name), asked, title, across=across, null=null, **look)

    def draw_grid(
        self,
        values: Tensor | np.ndarray,
        quantity: Quantity,
        title: str,
        *,
        across: str = "head",
        columns: Sequence[str] | None = None,
        text: Sequence[Sequence[str]] | Callable[[float], str] | None = None,
        null: tuple[str, Tensor | np.ndarray] | None = None,
        **look: Unpack[figures.Look],
    ) -> go.Figure:
        """Numbers by layer and head (or another axis `across`), coloured as their quantity says.

        `columns`: the labels of that axis that are shown, if not all. `text`: what stands in each cell, or a function
        of its number. `null`: what they are compared with, its name and its numbers: one for all cells, one per layer,
        or one per cell.
        """
        signed, layers = quantity.low < 0 < quantity.high, self.labels("layer")
        bounded = not signed and np.isfinite(quantity.high)
        drawn: dict[str, Any] = {
            "x": self.labels(across) if columns is None else columns,
            "y": layers,
            "title": title,
            "x_title": across.replace("kv_head", "key/value head"),
            "y_title": figures.layer_title(layers),
            "colour_title": quantity.title,
            "signed": signed,
            "low": quantity.low if bounded else None,
            "high": quantity.high if bounded else None,
            "dark_is_high": not quantity.low_on_top,
            "logarithmic": quantity.logarithmic,
            **look,
        }
        name, beside = null or ("", None)
        panels = {quantity.says: values.tolist()}
        if beside is not None and beside.ndim == 2:
            panels[name] = beside.tolist()
            written = [[list(map(text, row)) for row in each] for each in panels.values()] if callable(text) else None
            named = [(figures.named(says, 40), each) for says, each in panels.items()]
            return figures.small_grids(named, text=written, **drawn)
        column = None if beside is None else np.broadcast_to(np.asarray(beside), len(layers)).tolist()
        if callable(text):
            rows = values.tolist() if column is None else np.column_stack([values, column]).tolist()
            text = [list(map(text, row)) for row in rows]
        return figures.heatmap(values.tolist(), text=text, null=None if column is None else (name, column), **drawn)

    def figure_test(self, table: pd.DataFrame, **look: Unpack[figures.Look]) -> go.Figure:
        """A comparison by layer and head (or unit): effects around 0, a star where q < 0.05.

        `table`: what a test of this result returned, or some of its rows. If it has more units per layer than can be
        drawn, those with the smallest q are shown.
        """
        across = next((axis for axis in ("head", "kv_head", "unit") if axis in table), "head")
        lacking = [name for name in ("layer", across, "effect", "q") if name not in table]
        if lacking or len(table[["layer", across]].drop_duplicates()) < len(table):
            raise ValueError(
                f"figure_test needs a table with one row per layer and head (or unit), an effect and a q; got "
                f"{f'no column {lacking[0]!r}' if lacking else 'several rows per cell'}: pass what a test returned"
            )
        shown = table if len(set(table[across])) <= figures.COLUMNS else table.nsmallest(figures.COLUMNS, "q")
        columns = [label for label in self.labels(across) if label in set(shown[across])]
        found, effect = table["q"] < 0.05, table["effect"]
        starred = table.assign(star=np.where(found, "*", ""))
        values, stars = (
            starred.pivot(index="layer", columns=across, values=name).reindex(
                index=self.labels("layer"), columns=columns
            )
            for name in ("effect", "star")
        )
        says = table.attrs.get("effect", "effect")
        what, bracket, unit = says.rpartition(" (")
        up, down = (np.count_nonzero(found & side) for side in (effect > 0, effect < 0))
        title = f"{Quantity(says).heading}\nstar: q < 0.05 ({up} positive and {down} negative of {len(table)})"
        return self.draw_grid(
            values.to_numpy(float),
            Quantity(f"effect{bracket}{unit}" if what else "effect"),
            self.title(title),
            across=across,
            columns=columns,
            text=stars.fillna("").to_numpy().tolist(),
            **look,
        )

    def title(self, question: str) -> str:
        """A figure's title: the question, and below it under which conditions of which model it was asked."""
        below = [line for line in (self.conditions(), self.provenance.describe()) if line]
        return f"{question}\n{'; '.join(below)}"

    def conditions(self) -> str:
        """What else a reader of a figure must know: the read point, the metric, the target."""
        return ""

    # Merging

    @classmethod
    def merge(cls: type[R], parts: Sequence[R]) -> R:
        """One result from those of several batches, equal to one run over everything; prompts are renumbered in order.

        Merging is associative: `merge([merge([a, b]), c])` equals `merge([a, b, c])`.
        """
        if isinstance(parts, Result) or not isinstance(parts, Iterable):
            raise TypeError(
                f"merge takes a list of results; got one {type(parts).__name__}: write "
                f"{cls.__name__}.merge([result, other])"
            )
        parts = list(parts)
        if not parts:
            raise ValueError("merge takes one result or more; got none: pass a list of them")
        kinds = {type(part) for part in parts}
        if len(kinds) > 1 or not issubclass(type(parts[0]), cls):
            names = ", ".join(sorted(kind.__name__ for kind in kinds))
            raise TypeError(f"merge takes results of one kind, {cls.__name__}; got {names}")
        return parts[0] if len(parts) == 1 else type(parts[0]).merged(parts)

    @classmethod
    def merged(cls: type[R], parts: Sequence[R]) -> R:
        """What `merge` makes of several parts of this class. A result that keeps only some rows drops the others here.

        It must stay associative: a row that a part drops would not be kept of all.
        """
        return cls(**merged_fields(parts))

    def check_comparable(self, other: Any) -> None:
        """Raise unless another result asks the same of the same prompts, so that only the model differs."""
        kind = type(self).__name__
        if type(other) is not type(self):
            raise TypeError(f"two results of one class must be compared; got {kind} and {type(other).__name__}")
        if _asked(self) != _asked(other):
            raise ValueError(
                "two models must be compared on the same prompts; got other token ids: run both on the same prompts, "
                "with tokenizers that give the same ids"
            )
        if self.provenance.probe != other.provenance.probe:
            raise ValueError(
                f"two models must be compared with the same settings; got {self.provenance.probe} and "
                f"{other.provenance.probe}: run one of them again with the settings of the other"
            )

    # Tables

    def cells(self, *axes: str) -> pd.DataFrame:
        """The labels of every cell of some axes, laid end to end in that order; one column per axis."""
        levels = [_column(self.labels(axis), np.arange(len(self.labels(axis)))) for axis in axes]
        return pd.MultiIndex.from_product(levels, names=axes).to_frame(index=False)

    def to_frame(self, name: str | None = None) -> pd.DataFrame:
        """A tidy table, one row per cell; columns are all quantities with the axes of `name`.

        Without a name, it is of the headline quantity, or of the first that this run has. What is missing is NA. Layers
        and heads are ordered categories. Token ids have their texts beside them (`top_ids`: `top_text`),
        log-probabilities the probabilities (`log_prob`: `prob`).
        """
        schema_ = schema(type(self))
        axes = schema_.every
        if name is None:
            kept = [schema_.headline, *axes]
            name = next(each for each in kept if each in schema_.derived or getattr(self, each) is not None)
        if not isinstance(name, str):
            raise TypeError(f"to_frame takes the name of one tensor, such as {next(iter(axes))!r}; got {brief(name)}")
        if name not in axes:
            raise ValueError(f"{type(self).__name__} has no tensor {name!r}; it has {', '.join(axes)}")
        columns = {other: getattr(self, other) for other, dims in axes.items() if dims == axes[name]}
        columns = {other: tensor for other, tensor in columns.items() if tensor is not None}
        if name not in columns:
            self.known(name)  # says what to do
        shape = columns[name].shape
        index = np.indices(tuple(shape)).reshape(len(shape), shape.numel())
        frames = [self._axis_frame(axis, at) for axis, at in zip(axes[name], index, strict=True)]
        cells: dict[str, Any] = {}
        vocab = getattr(self, "vocab", ())
        for other, tensor in columns.items():
            cells[other] = tensor.flatten().numpy()
            if (missing := self.quantity(other).missing) is not None:
                cells[other] = pd.Series(cells[other], dtype="Int64").mask(cells[other] == missing)
            if other.endswith("ids") and vocab:
                texts = [vocab[i] if i >= 0 else "" for i in tensor.flatten().tolist()]
                cells[f"{other.removesuffix('ids')}text"] = texts
            if other.endswith("log_prob"):
                cells[f"{other.removesuffix('log_prob')}prob"] = tensor.exp().flatten().numpy()
        frames.append(pd.DataFrame(cells))
        return pd.concat(frames, axis=1)

    def _axis_frame(self, axis: str, at: np.ndarray) -> pd.DataFrame:
        labels = self.labels(axis)
        if isinstance(labels, Table):
            frame = labels.to_frame().iloc[at].reset_index(drop=True)
            return frame.add_prefix("other_") if axis.startswith("other_") else frame
        return pd.DataFrame({axis: at if labels is None else _column(labels, at)})

    def to_xarray(self) -> "xr.Dataset":
        """Every tensor with its labels as an xarray Dataset (install `lens-probes[xarray]`)."""
        try:
            import xarray as xr
        except ImportError as error:
            raise ImportError('to_xarray needs xarray: pip install "lens-probes[xarray]"') from error
        arrays = {
            name: (dims, tensor.numpy())
            for name, dims in schema(type(self)).axes.items()
            if (tensor := getattr(self, name)) is not None
        }
        coordinates: dict[str, Any] = {}
        for axis in {axis for dims, _ in arrays.values() for axis in dims}:
            labels = self.labels(axis)
            if isinstance(labels, Table):
                for column, values in labels.to_frame().items():
                    coordinates[f"{axis}_{column}"] = (axis, values.to_numpy())
            elif labels is not None:
                coordinates[axis] = list(labels)
        return xr.Dataset(arrays, coordinates, {"provenance": json.dumps(dataclasses.asdict(self.provenance))})

    # Files

    def save(self, path: str | os.PathLike[str]) -> None:
        """One `.safetensors` file with the labels and the provenance in its metadata, written whole or not at all."""
        files.write(path, self)

    @classmethod
    def load(cls: type[R], path: str | os.PathLike[str]) -> R:
        """Read a saved result. Nothing in the file is executed or imported: its class must be known already."""
        known = {kind.__name__: kind for kind in _subclasses(cls) if schema(kind).axes}
        return files.read(path, known, cls.__name__)

    # Showing

    def __repr__(self) -> str:
        sizes: dict[str, int] = {}
        for name, dims in schema(type(self)).axes.items():
            if (tensor := getattr(self, name)) is not None:
                sizes.update(zip(dims, tensor.shape, strict=True))
        shown = ", ".join(f"{axis} {size:,}" for axis, size in sizes.items())
        return f"{type(self).__name__}({shown}; content {self.content_hash()})"

    def content_hash(self) -> str:
        """Eight hexadecimal digits of numbers and labels: two results that print alike hold the same."""
        digest = hashlib.blake2b(digest_size=4)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, Table | Provenance):
                digest.update(
                    value.contiguous().numpy().tobytes() if isinstance(value, Tensor) else repr(value).encode()
                )
        return digest.hexdigest()

    def _repr_html_(self) -> str:
        by = self.provenance
        lines = [f"<b>{type(self).__name__}</b> of {html.escape(by.probe)}", html.escape(by.describe())]
        lines += [
            f"<code>{name}</code> [{' '.join(dims)}] {html.escape(self.quantity(name).title)}"
            for name, dims in schema(type(self)).axes.items()
            if getattr(self, name) is not None
        ]
        return "<br>".join(lines)


def _known(tensor: Tensor, missing: int | None) -> Float64[np.ndarray, "..."]:
    """Numbers as float64, NaN where one is missing."""
    values = tensor.double()
    return (values if missing is None else values.masked_fill(tensor == missing, np.nan)).numpy()


def _asked(result: Result) -> list[Any]:
    """The prompts of a result: ids of tokens, texts of prompts."""
    tables = [getattr(result, name) for name in schema(type(result)).tables]
    return [
        (table.id.tolist(), table.prompt.tolist()) if isinstance(table, Tokens) else table.text
        for table in tables
        if isinstance(table, Tokens | PromptTable)
    ]


def load(path: str | os.PathLike[str]) -> Any:
    """Read a saved result of any kind. Nothing in the file is executed or imported: its class must be known already."""
    return Result.load(path)


def _column(labels: Sequence[Any], at: np.ndarray) -> Any:
    """Labels by their places: texts are ordered categories, so that layer 10 comes after 9 in any table."""
    if not all(isinstance(label, str) for label in labels):
        return np.asarray(labels)[at]
    return pd.Categorical.from_codes(at, categories=list(labels), ordered=True)


def _subclasses(kind: type[R]) -> list[type[R]]:
    return [kind, *(found for below in kind.__subclasses__() for found in _subclasses(below))]
