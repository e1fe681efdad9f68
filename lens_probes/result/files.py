"""One `.safetensors` file per result: tensors as they are, labels and provenance as JSON in its metadata.

Nothing in a file is executed or imported, and every part of it is checked against the annotation of its field. A file
is written whole or not at all.
"""

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lens_probes.messages import brief
from lens_probes.result.provenance import Provenance
from lens_probes.result.schema import schema
from lens_probes.settings import fits
from lens_probes.text.prompts import PromptTable, Table, Tokens

FORMAT = 4
FORMATS = r"lens_probes result (\d{1,9})"


def write(path: str | os.PathLike[str], result: Any) -> None:
    """Save a result under this name; a file that is there already is replaced."""
    path = Path(path)
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for field in dataclasses.fields(result):
        name, value = field.name, getattr(result, field.name)
        if isinstance(value, Table):
            for column, values in value.columns().items():
                (tensors if isinstance(values, Tensor) else plain)[f"{name}.{column}"] = values
        elif isinstance(value, Tensor):
            tensors[name] = value
        else:
            plain[name] = dataclasses.asdict(value) if isinstance(value, Provenance) else value
    metadata = {"format": f"lens_probes result {FORMAT}", "result": type(result).__name__, "plain": json.dumps(plain)}
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} to save {path.name} in: make it first")
    stored: set[int] = set()
    for name, tensor in tensors.items():
        whole = tensor.contiguous()
        # safetensors refuses tensors that share memory, as columns of two tables may.
        tensors[name] = whole.clone() if whole.untyped_storage().data_ptr() in stored else whole
        stored.add(whole.untyped_storage().data_ptr())
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        # By way of bytes: the library's own way to a file leaves another temporary one when it is killed.
        temporary.write_bytes(save(tensors, metadata))
        replace_by(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def replace_by(temporary: Path, path: Path) -> None:
    """Rename a file once its contents are on the disk, so that a crash leaves the old file or the whole new one."""
    _sync(temporary)
    os.replace(temporary, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def read(path: str | os.PathLike[str], known: Mapping[str, type], asked: str) -> Any:
    """The result in a file, of one of the known classes; `asked` is the name of the class that reads it."""
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
        raise ValueError(f"{path} is not a lens_probes result, or was cut short ({error}): save it again") from error
    if not number:
        raise ValueError(f"{path} is not a lens_probes result: its format is {says!r}")
    if number != FORMAT:
        todo = "update lens-probes" if number > FORMAT else "run the probe again, or read it with an older lens-probes"
        raise ValueError(f"{path} has format {number} and this version reads format {FORMAT}: {todo}")
    if metadata.get("result") not in known:
        raise ValueError(
            f"{path} holds a {metadata.get('result')} and {asked}.load reads {', '.join(sorted(known))}: use that "
            f"class, or import the package that defines it first"
        )
    return _rebuilt(known[metadata["result"]], tensors, plain, path)


def _rebuilt(kind: type, tensors: dict[str, Tensor], plain: Any, path: Any) -> Any:
    """A result from the parts of its file, each checked against its annotation."""
    if not isinstance(plain, dict):
        raise ValueError(f"{path} does not fit a {kind.__name__} (its labels are no table): save it again")
    parts = {**plain, **tensors}
    try:
        values: dict[str, Any] = {}
        for field in dataclasses.fields(kind):
            if field.name == "provenance":
                values[field.name] = Provenance(**_fitting(Provenance, parts["provenance"]))
            elif field.name in schema(kind).tables:
                table = schema(kind).tables[field.name]
                columns = {column.name: parts[f"{field.name}.{column.name}"] for column in dataclasses.fields(table)}
                values[field.name] = table(**_fitting(table, columns, f"{field.name}."))
            elif isinstance(parts[field.name], dict):  # texts by id, which JSON writes as text
                values[field.name] = {int(i): text for i, text in parts[field.name].items()}
            else:
                values[field.name] = parts[field.name]
        result = kind(**_fitting(kind, values))
        _check_numbers(result)
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
        if name in hints and not fits(value, hints[name]):
            came = f"a tensor {tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else brief(value)
            raise ValueError(f"{prefix}{name} cannot be {came}")
    return values


def _entries(result: Any, of: str) -> Any:
    """What numbers may count: texts or labels, or the entries of an axis that has none; None if there is neither."""
    labels = getattr(result, of, None)
    if labels is not None and not isinstance(labels, Tensor):
        return labels
    for name, axes in schema(type(result)).axes.items():
        if of in axes and (tensor := getattr(result, name)) is not None:
            return range(tensor.shape[axes.index(of)])
    return None


def _check_numbers(result: Any) -> None:
    """Raise where whole numbers count entries that the labels do not have, or two tables tell of different prompts."""
    schema_ = schema(type(result))
    tables = [table for name in schema_.tables if len(table := getattr(result, name))]
    counted = {
        name: (getattr(result, name), 0 if quantity.missing is None else quantity.missing, quantity.into)
        for name, quantity in schema_.quantities.items()
        if quantity.into
    }
    for table in tables:
        if isinstance(table, Tokens):
            if (table.prompt.diff() < 0).any() or table.prompt[0] < 0:
                raise ValueError("the tokens of its prompts are not end to end")
            if isinstance(getattr(result, "vocab", None), tuple) and result.vocab:
                counted["token id"] = table.id, 0, "vocab"
    for name, (numbers, low, into) in counted.items():
        if numbers is None or not numbers.numel():
            continue
        lowest, highest, labels = int(numbers.min()), int(numbers.max()), _entries(result, into)
        if isinstance(labels, dict):
            known = labels.keys() | ({-1} if low == -1 else set())
            outside = set(numbers.unique().tolist()) - known
            if outside:
                raise ValueError(f"{name} has the entry {min(outside)}, and {into} has no text for it")
        elif lowest < low or (labels is not None and highest >= len(labels)):
            has = "is not in this result" if labels is None else f"has {len(labels)} entries"
            raise ValueError(f"{name} goes from {lowest} to {highest}, and {into} {has}")
    own, known = (
        {n for table in tables if isinstance(table, kind) for n in table.prompt.tolist()}
        for kind in (Tokens, PromptTable)
    )
    if known and not own <= known:
        raise ValueError(f"a token is of prompt {min(own - known)}, and the prompts have no such number")
