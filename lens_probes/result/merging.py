"""Merging, field by field: rows end to end, sums by label, and what is constant must agree.

A result is known here by its fields and labels only.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lens_probes.result.provenance import merged_provenance
from lens_probes.result.schema import ROW_AXES, Schema, schema
from lens_probes.text.prompts import concatenate


def merged_fields(parts: Sequence[Any]) -> dict[str, Any]:
    """The fields of one result made of several of its class; prompts are renumbered in order."""
    schema_ = schema(type(parts[0]))
    offsets = [0, *np.cumsum([part.provenance.n_prompts for part in parts])[:-1].tolist()]
    labels = _labels_of_sums(schema_, parts)
    merged: dict[str, Any] = {"provenance": merged_provenance([part.provenance for part in parts])}
    for field in dataclasses.fields(parts[0]):
        name, kind = field.name, schema_.kind.get(field.name)
        values = [getattr(part, name) for part in parts]
        if name in merged:
            continue
        if name in schema_.tables:
            merged[name] = concatenate(values, offsets)
        elif name in labels:
            merged[name] = labels[name]
        elif kind == "rows" and all(value is not None for value in values):
            merged[name] = _end_to_end(name, schema_.axes[name], values)
        elif kind == "sum" and all(value is not None for value in values):
            aligned = (_aligned(part, name, schema_.axes[name], labels) for part in parts)
            merged[name] = functools.reduce(torch.add, aligned)
        elif all(isinstance(value, dict) for value in values):  # texts by id: those of all parts
            merged[name] = dict(sorted({i: text for value in values for i, text in value.items()}.items()))
        elif all(_equal(values[0], value) for value in values[1:]):
            merged[name] = values[0]
        else:
            shown = " and ".join(str(value)[:40] for value in values[:2])
            raise ValueError(
                f"results that differ in {name!r} cannot be merged ({shown}): they come from different settings or "
                f"models, or {name!r} depends on the tokens and must be declared with summed(...)"
            )
    return merged


def _labels_of_sums(schema_: Schema, parts: Sequence[Any]) -> dict[str, tuple[str, ...]]:
    """The labels that only sums have, which may differ between parts: all of them, in the order they come up."""

    def axes_of(*kinds: str) -> set[str]:
        return {
            axis.removeprefix("other_")
            for name in schema_.kind
            if schema_.kind[name] in kinds
            for axis in schema_.axes[name]
        }

    own = axes_of("sum") - axes_of("rows", "constant")
    return {
        axis: tuple(dict.fromkeys(label for part in parts for label in part.labels(axis)))
        for axis in own
        if isinstance(parts[0].labels(axis), tuple)
    }


def _end_to_end(name: str, dims: tuple[str, ...], values: list[Tensor]) -> Tensor:
    row_axes = [i for i, axis in enumerate(dims) if axis.removeprefix("other_") in ROW_AXES]
    shapes = {tuple(size for i, size in enumerate(value.shape) if i not in row_axes) for value in values}
    if len(row_axes) != 1 or len(shapes) > 1:
        raise ValueError(f"field {name!r} [{' '.join(dims)}] cannot be laid end to end: the other axes are {shapes}")
    return torch.cat(values, dim=row_axes[0])


def _aligned(part: Any, name: str, dims: tuple[str, ...], labels: dict[str, tuple[str, ...]]) -> Tensor:
    """A part's sum on the labels of all parts."""
    tensor = getattr(part, name)
    for dim, axis in enumerate(dims):
        axis = axis.removeprefix("other_")
        if axis in labels and part.labels(axis) != labels[axis]:
            shape = list(tensor.shape)
            shape[dim] = len(labels[axis])
            index = torch.tensor([labels[axis].index(label) for label in part.labels(axis)], dtype=torch.int64)
            tensor = tensor.new_zeros(shape).index_copy(dim, index, tensor)
    return tensor


def with_prompts_in_order(result: Any, order: Sequence[int], topics: Sequence[str] = ()) -> Any:
    """A result that was measured in another order, as it would be in this one.

    `order`: the place of each of its prompts, in the order of the result. Rows are sorted, and `topics` come in order
    where sums have them.
    """
    schema_ = schema(type(result))
    number = torch.tensor(order).argsort().argsort()  # of each prompt, by its number until now
    values: dict[str, Any] = {}
    rows = {"prompt": number.argsort()}  # of the new result, by axis
    for name in schema_.tables:
        table = getattr(result, name)
        rows[name] = number[table.prompt].argsort(stable=True)
        values[name] = dataclasses.replace(table[rows[name]], prompt=number[table.prompt][rows[name]])
    labels = _labels_of_sums(schema_, [result])
    labels = {axis: own for axis, own in labels.items() if axis == "topic"}
    labels = {
        axis: tuple(sorted(own, key=list(topics).index)) for axis, own in labels.items() if set(own) <= set(topics)
    }
    for name, kind in schema_.kind.items():
        tensor = getattr(result, name)
        if tensor is not None and kind == "sum":
            values[name] = _aligned(result, name, schema_.axes[name], labels)
        elif tensor is not None and kind == "rows":
            for dim, axis in enumerate(schema_.axes[name]):
                if (axis := axis.removeprefix("other_")) in ROW_AXES:
                    if axis not in rows:
                        raise TypeError(
                            f"{type(result).__name__}.{name} must have a table of labels for its axis {axis!r}; got "
                            f"none: declare it, so that rows can be sorted"
                        )
                    tensor = tensor.index_select(dim, rows[axis])
            values[name] = tensor
    return dataclasses.replace(result, **values, **labels)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
    return type(one) is type(other) and one == other
