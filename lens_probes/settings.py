"""Settings of probes and experiments: an annotation says what each setting may be, and one place checks them.

    steps: Positive = 100
    loss: Literal["cosine", "l2"] = "l2"
    center: Annotated[ResidualMeanResult | None, described("the result of ResidualMean().run(model, texts)")] = None

Every message has this form: `LogitLens(top_k=...) must be a whole number, 0 or more; got -1`.
"""

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from lens_probes.messages import brief


class Allowed(NamedTuple):
    """What a value must be besides its type: in words, and as a function.

    `kind` is how help() shows the type, where that is shorter.
    """

    says: str
    holds: Callable[[Any], bool]
    restricts: bool = True
    kind: str = ""


def at_least(n: int) -> Allowed:
    """Whole numbers, n or more."""
    return Allowed(f"a whole number, {n} or more", lambda value: value >= n)


def above(low: int | float) -> Allowed:
    """Finite numbers above a bound."""
    return Allowed(f"a number above {low:g}", lambda value: low < value < float("inf"))


def from_on(low: int | float) -> Allowed:
    """Finite numbers, a bound or more."""
    return Allowed(f"a number, {low:g} or more", lambda value: low <= value < float("inf"))


def between(low: int | float, high: int | float) -> Allowed:
    """Numbers between two bounds, both excluded."""
    return Allowed(f"a number between {low:g} and {high:g}", lambda value: low < value < high)


def described(says: str) -> Allowed:
    """Values of the annotated type, described by these words in errors."""
    return Allowed(says, lambda value: True, restricts=False)


Count = Annotated[int, at_least(0)]
Positive = Annotated[int, at_least(1)]
Rate = Annotated[float, above(0)]
Share = Annotated[float, between(0, 1)]
Seed = Annotated[int, at_least(0)]
Units = Annotated[Sequence[int], described("a list of whole numbers, such as [3] or range(8)")]
if TYPE_CHECKING:
    Layers = Sequence[int] | slice | None
else:  # checked by the view of a model, which knows the number of layers
    Layers = Annotated[Any, Allowed("layers", lambda value: True, False, "Sequence[int] | slice | None")]
"""Layer numbers (negative ones count from the end), or None for all layers."""


def check_settings(kind: type, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise unless the annotation of each given setting allows its value."""
    hints = get_type_hints(kind, include_extras=True)
    try:
        given = inspect.signature(kind.__init__).bind(None, *args, **kwargs).arguments
    except TypeError:
        known = [each.name for each in dataclasses.fields(kind)]
        for name in (each for each in kwargs if each not in known):
            close = difflib.get_close_matches(name, known, n=1)
            hint = f": did you mean {close[0]}?" if close else ""
            raise TypeError(f"{kind.__name__} takes {', '.join(known) or 'no settings'}; got {name!r}{hint}") from None
        return  # too few or too many: the constructor raises
    for name, value in given.items():
        if name in hints and not allows(hints[name], value):
            error = ValueError if _is_restricted(hints[name]) else TypeError
            raise error(f"{kind.__name__}({name}=...) must be {says(hints[name])}; got {brief(value)}")


def allows(hint: Any, value: Any) -> bool:
    """Whether an annotation allows a value.

    >>> allows(Positive, 3), allows(Positive, 0), allows(Positive | None, None), allows(Literal["a"], "b")
    (True, False, True, False)
    """
    if get_origin(hint) is Annotated:
        kind, *notes = get_args(hint)
        return allows(kind, value) and all(note.holds(value) for note in notes if isinstance(note, Allowed))
    if get_origin(hint) in (Union, UnionType):
        return any(allows(option, value) for option in get_args(hint))
    return fits(value, hint)


def says(hint: Any) -> str:
    """What an annotation allows, in words.

    >>> says(Positive | None), says(Literal["a", "b", "c"]), says(bool)
    ('a whole number, 1 or more, or None', "'a', 'b' or 'c'", 'True or False')
    """
    if get_origin(hint) is Annotated:
        kind, *notes = get_args(hint)
        return next((note.says for note in notes if isinstance(note, Allowed)), says(kind))
    if get_origin(hint) in (Union, UnionType):
        *options, last = [says(option) for option in get_args(hint)]
        separator = ", " if any("," in option for option in options) else " "
        return f"{', '.join(options)}{separator}or {last}"
    if get_origin(hint) is Literal:
        *options, last = map(repr, get_args(hint))
        return f"{', '.join(options)} or {last}" if options else last
    words = {bool: "True or False", int: "a whole number", float: "a number", str: "a text", NoneType: "None"}
    kind = get_origin(hint) or hint
    if kind is Callable or kind is get_origin(Callable[[], None]):
        return "a function"
    return words.get(kind) or f"a {getattr(kind, '__name__', kind)}"


def fits(value: Any, hint: Any) -> bool:
    """Whether a value has the type of a plain annotation; True is not a whole number.

    >>> fits((1, 2), tuple[int, ...]), fits(True, int), fits(1, float), fits("a", str | None)
    (True, False, True, True)
    """
    kind, options = get_origin(hint) or hint, get_args(hint)
    if kind is Annotated:
        return fits(value, options[0])
    if kind in (Union, UnionType):
        return any(fits(value, option) for option in options)
    if kind is Literal:
        return any(type(value) is type(option) and value == option for option in options)
    if kind is tuple:
        each = (options[:1] * len(value) if options[1:] == (...,) else options) if isinstance(value, tuple) else ()
        return isinstance(value, tuple) and len(value) == len(each) and all(map(fits, value, each))
    if kind is dict and options:
        return isinstance(value, dict) and all(fits(each, tuple[options]) for each in value.items())
    if kind in (int, float):
        return type(value) is int or type(value) is kind
    if kind is Sequence and options:
        return (
            isinstance(value, Sequence) and not isinstance(value, str) and all(fits(each, options[0]) for each in value)
        )
    return kind is Any or not isinstance(kind, type) or isinstance(value, kind)


class Plain(str):
    """A text that prints without quotes, where help() shows a type."""

    __slots__ = ()
    __repr__ = str.__str__


def plain_type(hint: Any) -> str:
    """An annotation as help() shows it: without what only a check needs.

    >>> plain_type(Positive | None), plain_type(Literal["a", "b"]), plain_type(Sequence[int]), plain_type(Layers)
    ('int | None', "'a' | 'b'", 'Sequence[int]', 'Sequence[int] | slice | None')
    """
    origin, options = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return next(
            (note.kind for note in options[1:] if isinstance(note, Allowed) and note.kind), plain_type(options[0])
        )
    if origin in (Union, UnionType):
        return " | ".join(dict.fromkeys(map(plain_type, options)))
    if origin is Literal:
        return " | ".join(map(repr, options))
    if hint in (None, NoneType, ...):
        return "..." if hint is ... else "None"
    name = getattr(origin or hint, "__name__", str(hint))
    inside = ", ".join(plain_type(option) for option in options if option is not Any)
    return f"{name}[{inside}]" if inside and name != "Callable" else name


def show_plain_types(function: Any, hints: Mapping[str, Any], named: Mapping[Any, str] | None = None) -> None:
    """Let help() show a function's parameters with `plain_type`. Type checkers read the source.

    `named`: annotations that have a name, which is shown instead.
    """
    shown, names = inspect.signature(function), named or {}
    plain = {name: Plain(names[hint] if hint in names else plain_type(hint)) for name, hint in hints.items()}
    parameters = [each.replace(annotation=plain.get(each.name, each.annotation)) for each in shown.parameters.values()]
    returned = plain.get("return", shown.return_annotation)
    function.__signature__ = shown.replace(parameters=parameters, return_annotation=returned)


def show_plain_fields(kind: type) -> None:
    """The same for a dataclass: help() of the class begins with its fields."""
    show_plain_types(kind.__init__, {each.name: each.type for each in dataclasses.fields(kind)})


def _is_restricted(hint: Any) -> bool:
    """Whether an annotation allows only some values of a type."""
    if get_origin(hint) is Annotated:
        return any(isinstance(note, Allowed) and note.restricts for note in get_args(hint)[1:])
    return get_origin(hint) is Literal or any(_is_restricted(option) for option in get_args(hint))
