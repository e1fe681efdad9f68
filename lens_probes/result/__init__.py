"""Results: typed tensors with their labels. Merging, tables and files all follow from the field annotations.

A result is a frozen dataclass. A tensor field says its axes once, in its annotation, and that is the whole schema:

    rank: Int[Tensor, "layer token"] = field(metadata=unit("rank of the token's own embedding, 0 is closest", low=0))
    layer: tuple[str, ...]      # labels of an axis live in the field of its name: texts, or a table such as Tokens
    token: Tokens

What `merge` does with a tensor is one of four: fields with a `token`, `prompt` or `pair` axis are *rows* and are laid
end to end; those marked `summed` are added and those marked `maximum` maximised, both aligned by label; all the rest
is *constant* and must agree.
"""

import abc
import dataclasses
import hashlib
import html
import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lens_probes.text.prompts import PromptTable, Table, Tokens, concatenate, whole_number

if TYPE_CHECKING:
    import plotly.graph_objects as go
    import xarray as xr

ROW_AXES = frozenset({"token", "prompt", "pair"})
FORMAT = 1  # of files; there is no older one yet to convert, and a newer one is refused
FORMATS = r"lens_probes result (\d{1,9})"


# What a field says of itself


def unit(says: str, *, low: int | float = -math.inf, high: int | float = math.inf, index: str = "") -> dict[str, Any]:
    """Metadata of a tensor field: what its numbers are, in which unit, and between which bounds.

    `index`: the label field whose entries whole numbers count, such as `vocab` for token ids.
    """
    return {"says": says, "low": low, "high": high, "index": index}


def summed(says: str) -> dict[str, Any]:
    """Metadata of a float64 field that `merge` adds, aligned by label; absent counts as 0."""
    return {**unit(says), "merge": "sum"}


def maximum(says: str) -> dict[str, Any]:
    """Metadata of a field of which `merge` takes the maximum, aligned by label; absent counts as missing."""
    return {**unit(says), "merge": "max"}


class Schema(NamedTuple):
    """What the annotations of a result class say: the axes of tensor fields and properties, and the label fields."""

    axes: dict[str, tuple[str, ...]]
    derived: dict[str, tuple[str, ...]]
    kind: dict[str, str]
    tables: dict[str, type[Table]]


@cache
def schema(result: type["Result"]) -> Schema:
    """Read a result class's annotations once."""
    hints = get_type_hints(result)
    axes = {name: dims for name, hint in hints.items() if (dims := _axes(hint)) is not None}
    derived = {
        name: dims
        for name in dir(result)
        if isinstance(attribute := getattr(result, name), property)
        and (dims := _axes(get_type_hints(attribute.fget).get("return"))) is not None
    }
    metadata = {field.name: field.metadata for field in fields(result)}
    kind = {
        name: "rows" if ROW_AXES & set(dims) else metadata[name].get("merge", "constant") for name, dims in axes.items()
    }
    tables = {name: hint for name, hint in hints.items() if isinstance(hint, type) and issubclass(hint, Table)}
    return Schema(axes, derived, kind, tables)


def _axes(hint: Any) -> tuple[str, ...] | None:
    """The axis names of a jaxtyping annotation (an optional one too), None for any other annotation."""
    for option in (hint, *get_args(hint)):
        if hasattr(option, "dim_str"):
            return tuple(option.dim_str.split())
    return None


# How a result came about


@dataclass(frozen=True)
class Provenance:
    """Which probe read which model, how the weights and numbers stood, and with which versions."""

    probe: str = ""
    model: str = ""
    model_class: str = ""
    processed: bool = False
    dtype: str = ""
    hooks: tuple[str, ...] = ()
    versions: tuple[tuple[str, str], ...] = ()
    n_prompts: int = 0
    n_tokens: int = 0

    @property
    def read(self) -> str:
        """The activation that was read last, in the order of `hooks`."""
        return self.hooks[-1] if self.hooks else "an activation not named"

    def describe(self) -> str:
        """Model, state of its weights, precision and numbers, for the second line of a title."""
        weights = "processed" if self.processed else "raw"
        numbers = f", {amount(self.n_prompts, 'prompt')}, {amount(self.n_tokens, 'token')}" if self.n_prompts else ""
        return f"{self.model} ({weights} weights, {self.dtype}){numbers}"


def amount(n: int, noun: str) -> str:
    """A number with its noun.

    >>> amount(1, "prompt"), amount(1200, "token")
    ('1 prompt', '1,200 tokens')
    """
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


R = TypeVar("R", bound="Result")


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Result(abc.ABC):
    """What a probe returns. Subclass it as a frozen dataclass (`eq=False, repr=False, kw_only=True`)."""

    provenance: Provenance = field(default_factory=Provenance)

    @abc.abstractmethod
    def figure(self) -> "go.Figure":
        """The main picture, drawn from what is stored."""

    def __post_init__(self) -> None:
        sizes: dict[str, int] = {}
        for name, dims in schema(type(self)).axes.items():
            tensor = getattr(self, name)
            if tensor is None:
                continue
            if tensor.device.type != "cpu" or tensor.ndim != len(dims):
                raise ValueError(
                    f"{type(self).__name__}.{name} is [{' '.join(dims)}] on the CPU; "
                    f"a tensor of shape {tuple(tensor.shape)} on {tensor.device} came"
                )
            for axis, size in zip(dims, tensor.shape, strict=True):
                labels = self.labels(axis)
                expected = sizes.setdefault(axis, size if labels is None else len(labels))
                if size != expected:
                    raise ValueError(
                        f"{type(self).__name__}.{name} has {size} entries on axis {axis!r}, and the labels or another "
                        f"field have {expected}"
                    )

    def labels(self, axis: str) -> Any:
        """The labels of an axis: the field of its name (`other_topic` is `topic` again), or None."""
        axis = axis.removeprefix("other_")
        return getattr(self, axis) if axis in self.__dataclass_fields__ else None

    def place_on(self, axis: str, asked: int) -> int:
        """Where on an axis what is called by this number stands: layer 13 or head 3 (`H3`), of those that are there.

        An axis whose labels have no numbers (one unit a layer) has place 0 only.
        """
        whole_number(axis, asked)
        labels = self.labels(axis)
        numbers = [int(digits) if (digits := re.sub(r"\D", "", label)) else 0 for label in labels]
        if asked not in numbers:
            raise ValueError(f"{axis} {asked!r} was asked for and this result has {', '.join(labels)}")
        return numbers.index(asked)

    def cells(self, *axes: str) -> pd.DataFrame:
        """The labels of every cell of some axes, laid end to end in that order: a row a cell, a column an axis."""
        return pd.MultiIndex.from_product([self.labels(axis) for axis in axes], names=axes).to_frame(index=False)

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
            raise ValueError("merge needs at least one result; none came")
        kinds = {type(part) for part in parts}
        if len(kinds) > 1 or not issubclass(type(parts[0]), cls):
            names = ", ".join(sorted(kind.__name__ for kind in kinds))
            raise TypeError(f"merge takes results of one kind ({cls.__name__}); {names} came")
        if len(parts) == 1:
            return parts[0]
        return type(parts[0])(**_merged_fields(parts))

    # Tables

    def to_frame(self, name: str | None = None) -> pd.DataFrame:
        """Tidy, one row a cell; the fields and properties with the axes of field `name` (the first) as columns.

        Beside vocabulary ids (`top_ids`) stand their texts (`top_text`).
        """
        schema_ = schema(type(self))
        axes = {**schema_.axes, **schema_.derived}
        if name is None:
            name = next(iter(schema_.axes))
        if not isinstance(name, str):
            raise TypeError(f"to_frame takes the name of one tensor, such as {next(iter(axes))!r}; got {name!r:.80}")
        if name not in axes:
            raise ValueError(f"{type(self).__name__} has no tensor {name!r}; it has {', '.join(axes)}")
        columns = {other: getattr(self, other) for other, dims in axes.items() if dims == axes[name]}
        columns = {other: tensor for other, tensor in columns.items() if tensor is not None}
        if name not in columns:
            raise ValueError(f"{name!r} was not asked for in this run: see {self.provenance.probe}")
        shape = columns[name].shape
        index = np.indices(tuple(shape)).reshape(len(shape), shape.numel())
        frames = [self._axis_frame(axis, at) for axis, at in zip(axes[name], index, strict=True)]
        cells: dict[str, Any] = {}
        vocab = getattr(self, "vocab", ())
        for other, tensor in columns.items():
            cells[other] = tensor.flatten().numpy()
            if other.endswith("ids") and vocab:
                cells[f"{other.removesuffix('ids')}text"] = [
                    vocab[i] if i >= 0 else "" for i in tensor.flatten().tolist()
                ]
        frames.append(pd.DataFrame(cells))
        return pd.concat(frames, axis=1)

    def _axis_frame(self, axis: str, at: np.ndarray) -> pd.DataFrame:
        labels = self.labels(axis)
        if isinstance(labels, Table):
            frame = labels.to_frame().iloc[at].reset_index(drop=True)
            return frame.add_prefix("other_") if axis.startswith("other_") else frame
        return pd.DataFrame({axis: at if labels is None else np.asarray(labels, dtype=object)[at]})

    def to_xarray(self) -> "xr.Dataset":
        """Every tensor with its labels as an xarray Dataset (install `lens-probes[xarray]`)."""
        try:
            import xarray as xr
        except ImportError as error:
            raise ImportError('to_xarray needs xarray: pip install "lens-probes[xarray]"') from error
        schema_ = schema(type(self))
        arrays = {
            name: (dims, tensor.numpy())
            for name, dims in schema_.axes.items()
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
        path = Path(path)
        tensors: dict[str, Tensor] = {}
        plain: dict[str, Any] = {}
        for name, value in self._values().items():
            if isinstance(value, Table):
                for column, values in value.columns().items():
                    (tensors if isinstance(values, Tensor) else plain)[f"{name}.{column}"] = values
            elif isinstance(value, Tensor):
                tensors[name] = value
            else:
                plain[name] = value
        plain["provenance"] = dataclasses.asdict(self.provenance)
        metadata = {"format": f"lens_probes result {FORMAT}", "result": type(self).__name__, "plain": json.dumps(plain)}
        if not path.parent.is_dir():
            raise FileNotFoundError(f"there is no folder {path.parent} to save {path.name} in: make it first")
        # Copies: safetensors refuses tensors that share memory, as columns of two tables may.
        tensors = {name: value.clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
        temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            temporary.touch()
            permissions = temporary.stat().st_mode  # those of any new file: safetensors makes one for its owner only
            save_file(tensors, temporary, metadata=metadata)
            temporary.chmod(permissions)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls: type[R], path: str | os.PathLike[str]) -> R:
        """Read a saved result. Nothing in the file is executed or imported: its class must be known already."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no result file at {path}")
        metadata, tensors, plain = {}, {}, None
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                says = metadata.get("format")
                number = int(found[1]) if (found := re.fullmatch(FORMATS, says or "")) else 0
                if number == FORMAT:
                    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                    plain = _tuples(json.loads(metadata["plain"]))
        except (SafetensorError, ValueError, KeyError, RecursionError) as error:
            raise ValueError(
                f"{path} is not a lens_probes result, or was cut short ({error}): save it again"
            ) from error
        if number > FORMAT:
            raise ValueError(
                f"{path} has format {number} and this version reads formats up to {FORMAT}: update lens-probes"
            )
        if number < FORMAT:
            raise ValueError(f"{path} is not a lens_probes result: its format is {says!r}")
        known = {kind.__name__: kind for kind in _subclasses(cls) if not kind.__abstractmethods__}
        if metadata.get("result") not in known:
            raise ValueError(
                f"{path} holds a {metadata.get('result')} and {cls.__name__}.load reads {', '.join(sorted(known))}: "
                f"use that class, or import the package that defines it first"
            )
        return _rebuild(known[metadata["result"]], tensors, plain, path)

    def _values(self) -> dict[str, Any]:
        """The fields other than the provenance."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "provenance"}

    # Showing

    def __repr__(self) -> str:
        sizes = ", ".join(f"{axis} {size:,}" for axis, size in self._sizes().items())
        return f"{type(self).__name__}({sizes}; content {self.content_hash()})"

    def _sizes(self) -> dict[str, int]:
        sizes: dict[str, int] = {}
        for name, dims in schema(type(self)).axes.items():
            if (tensor := getattr(self, name)) is not None:
                sizes.update(zip(dims, tensor.shape, strict=True))
        return sizes

    def content_hash(self) -> str:
        """Eight hexadecimal digits of numbers and labels: two results that print alike hold the same."""
        digest = hashlib.blake2b(digest_size=4)
        for value in self._values().values():
            bits = value.contiguous().numpy().tobytes() if isinstance(value, Tensor) else repr(value).encode()
            digest.update(b"" if isinstance(value, Table) else bits)
        return digest.hexdigest()

    def _repr_html_(self) -> str:
        by = self.provenance
        lines = [
            f"<b>{type(self).__name__}</b> of {html.escape(by.probe)}",
            html.escape(by.describe()),
        ]
        for name, dims in schema(type(self)).axes.items():
            if getattr(self, name) is not None:
                says = self.__dataclass_fields__[name].metadata.get("says", "")
                lines.append(f"<code>{name}</code> [{' '.join(dims)}] {html.escape(says)}")
        return "<br>".join(lines)


def _subclasses(kind: type[R]) -> list[type[R]]:
    return [kind, *(found for below in kind.__subclasses__() for found in _subclasses(below))]


def _rebuild(kind: type[R], tensors: dict[str, Tensor], plain: Any, path: Any) -> R:
    """A result from the parts of its file, each checked against its annotation."""
    if not isinstance(plain, dict):
        raise ValueError(f"{path} does not fit a {kind.__name__} (its labels are no table): save it again")
    parts = {**plain, **tensors}
    try:
        values: dict[str, Any] = {}
        for each in fields(kind):
            if each.name == "provenance":
                values[each.name] = Provenance(**_fitting(Provenance, parts["provenance"]))
            elif each.name in schema(kind).tables:
                table = schema(kind).tables[each.name]
                columns = {column.name: parts[f"{each.name}.{column.name}"] for column in fields(table)}
                values[each.name] = table(**_fitting(table, columns, f"{each.name}."))
            else:
                values[each.name] = parts[each.name]
        result = kind(**_fitting(kind, values))
        _check_indices(result)
        return result
    except KeyError as error:
        raise ValueError(f"{path} lacks {error} of a {kind.__name__}: it was written by another version") from error
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} does not fit a {kind.__name__} ({error}): it was written by another version"
        ) from error


def _tuples(value: Any) -> Any:
    """JSON has lists where labels are tuples."""
    if isinstance(value, dict):
        return {name: _tuples(each) for name, each in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _fitting(kind: type, values: Any, prefix: str = "") -> dict[str, Any]:
    """The values of a dataclass's fields, or an error that names one whose value is not what its annotation says."""
    hints = get_type_hints(kind)
    for name, value in dict(values).items():
        if name in hints and not _fits(value, hints[name]):
            came = f"a tensor {tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else repr(value)[:60]
            raise ValueError(f"{prefix}{name} cannot be {came}")
    return values


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value read from a file is of the kind that an annotation names."""
    kind, options = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        return any(_fits(value, option) for option in options)
    if kind is Literal:
        return value in options
    if kind is tuple:
        each = (options[:1] * len(value) if options[1:] == (...,) else options) if isinstance(value, tuple) else ()
        return isinstance(value, tuple) and len(value) == len(each) and all(map(_fits, value, each))
    if kind in (int, float):  # True is an int to Python
        return type(value) is int or type(value) is kind
    return not isinstance(kind, type) or isinstance(value, kind)


def _check_indices(result: "Result") -> None:
    """Raise where whole numbers count entries that the labels do not have, or two tables tell of different prompts."""
    tables = [table for name in schema(type(result)).tables if len(table := getattr(result, name))]
    counted = {
        name: (getattr(result, name), each.metadata["low"], each.metadata["index"])
        for name, each in result.__dataclass_fields__.items()
        if each.metadata.get("index")
    }
    for table in tables:
        if isinstance(table, Tokens):
            if (table.prompt.diff() < 0).any() or table.prompt[0] < 0:
                raise ValueError("the tokens of its prompts are not end to end")
            if getattr(result, "vocab", ()):
                counted["token id"] = table.id, 0, "vocab"
    for name, (numbers, low, index) in counted.items():
        labels = getattr(result, index, ())
        if numbers is None or not numbers.numel():
            continue
        lowest, highest = int(numbers.min()), int(numbers.max())
        if lowest < low or highest >= len(labels):
            raise ValueError(f"{name} goes from {lowest} to {highest}, and {index} has {len(labels)} entries")
    own, known = (
        {n for table in tables if isinstance(table, kind) for n in table.prompt.tolist()}
        for kind in (Tokens, PromptTable)
    )
    if known and not own <= known:
        raise ValueError(f"a token is of prompt {min(own - known)}, and the prompts have no such number")


# Merging, field by field


def _merged_fields(parts: Sequence[R]) -> dict[str, Any]:
    schema_ = schema(type(parts[0]))
    offsets = [0, *np.cumsum([part.provenance.n_prompts for part in parts])[:-1].tolist()]
    aligned = {  # axes whose labels may differ between parts: those that only sums and maxima have
        axis
        for name, dims in schema_.axes.items()
        if schema_.kind[name] in ("sum", "max")
        for axis in dims
        if isinstance(parts[0].labels(axis), tuple)
    } - {axis for name, dims in schema_.axes.items() if schema_.kind[name] in ("rows", "constant") for axis in dims}
    labels = {axis: tuple(dict.fromkeys(x for part in parts for x in part.labels(axis))) for axis in aligned}
    merged: dict[str, Any] = {"provenance": _merged_provenance([part.provenance for part in parts])}
    for name in parts[0]._values():
        values = [getattr(part, name) for part in parts]
        kind = schema_.kind.get(name)
        if name in schema_.tables:
            merged[name] = concatenate(values, offsets)
        elif name in labels:
            merged[name] = labels[name]
        elif kind == "rows" and all(value is not None for value in values):
            merged[name] = _end_to_end(name, schema_.axes[name], values)
        elif kind in ("sum", "max") and all(value is not None for value in values):
            aligned_values = [_align(part, name, schema_.axes[name], labels, kind) for part in parts]
            merged[name] = _accumulate(aligned_values, kind)
        elif all(_equal(values[0], value) for value in values[1:]):
            merged[name] = values[0]
        else:
            raise ValueError(
                f"results that differ in {name!r} cannot be merged ({_short(values)}): they come from different "
                f"settings or models"
            )
    return merged


def _end_to_end(name: str, dims: tuple[str, ...], values: list[Tensor]) -> Tensor:
    row_axes = [i for i, axis in enumerate(dims) if axis.removeprefix("other_") in ROW_AXES]
    shapes = {tuple(size for i, size in enumerate(value.shape) if i not in row_axes) for value in values}
    if len(row_axes) != 1 or len(shapes) > 1:
        raise ValueError(f"field {name!r} [{' '.join(dims)}] cannot be laid end to end: the other axes are {shapes}")
    return torch.cat(values, dim=row_axes[0])


def _align(part: Result, name: str, dims: tuple[str, ...], labels: dict[str, tuple[str, ...]], kind: str) -> Tensor:
    """A part's tensor on the union of all parts' labels."""
    tensor = getattr(part, name)
    for dim, axis in enumerate(dims):
        axis = axis.removeprefix("other_")
        if axis in labels and part.labels(axis) != labels[axis]:
            shape = list(tensor.shape)
            shape[dim] = len(labels[axis])
            missing = math.nan if tensor.is_floating_point() else -1
            wider = tensor.new_full(shape, 0 if kind == "sum" else missing)
            index = torch.tensor([labels[axis].index(label) for label in part.labels(axis)])
            tensor = wider.index_copy(dim, index, tensor)
    return tensor


def _accumulate(values: list[Tensor], kind: str) -> Tensor:
    total = values[0]
    for value in values[1:]:
        total = total + value if kind == "sum" else torch.fmax(total, value)
    return total


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
    return type(one) is type(other) and one == other


def _short(values: list[Any]) -> str:
    return " and ".join(str(value)[:40] for value in values[:2])


def _merged_provenance(parts: list[Provenance]) -> Provenance:
    same = {dataclasses.replace(part, n_prompts=0, n_tokens=0) for part in parts}
    if len(same) > 1:
        one, other = list(same)[:2]
        names = [f.name for f in fields(Provenance) if getattr(one, f.name) != getattr(other, f.name)]
        raise ValueError(f"results of different runs cannot be merged: they differ in {', '.join(names)}")
    return dataclasses.replace(
        parts[0],
        n_prompts=sum(part.n_prompts for part in parts),
        n_tokens=sum(part.n_tokens for part in parts),
    )
