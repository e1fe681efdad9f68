"""What a result declares: each quantity once, with its axes, unit and bounds. Everything else follows from it.

    class TokenNormResult(LayerTokenResult):
        ratio: Float[Tensor, "layer token"] = measured("length of the state over that of the embedding", low=0)

Subclassing makes the frozen dataclass. Axes stand in the annotation, labels of an axis in the field of its name: texts,
or a table such as `Tokens`. What `merge` does with a tensor is one of three: with a `token`, `prompt` or `pair` axis it
is *rows*, laid end to end; what is `summed` is added, aligned by label; all the rest is *constant* and must agree.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, NamedTuple, TypeVar, dataclass_transform, get_args, get_type_hints

from lens_probes.settings import show_plain_fields
from lens_probes.text.prompts import Table

ROW_AXES = frozenset({"token", "prompt", "pair"})
Kind = Literal["rows", "sum", "constant"]
T = TypeVar("T")


class Quantity(NamedTuple):
    """What the numbers of a tensor are: in words, their unit and bounds, and how they are drawn.

    `missing` stands for no value in whole numbers (in others it is NaN). `null` names the quantity with which this one
    is compared. `into`: the label field or axis whose entries these numbers count, such as `vocab` for token ids.
    `by_id`: a fact about a token's id, so that word types are compared and not tokens.
    """

    says: str
    unit: str = ""
    low: float = -math.inf
    high: float = math.inf
    missing: int | None = None
    is_sum: bool = False
    null: str = ""
    into: str = ""
    by_id: bool = False
    low_on_top: bool = False
    logarithmic: bool = False

    @property
    def heading(self) -> str:
        """What the title of a figure begins with.

        >>> Quantity("entropy", "nats", low=0).heading
        'Entropy'
        """
        return f"{self.says[:1].upper()}{self.says[1:]}"

    @property
    def title(self) -> str:
        """What an axis or a colour bar says.

        >>> Quantity("entropy", "nats", low=0).title, Quantity("cosine with the mean", low=-1, high=1).title
        ('entropy (nats, 0 or more)', 'cosine with the mean (-1 to 1)')
        """
        notes = [note for note in (self.unit, _span(self.low, self.high)) if note]
        return f"{self.says} ({', '.join(notes)})" if notes else self.says


def _span(low: int | float, high: int | float) -> str:
    least, most = (f"{bound:,.12g}" for bound in (low, high))
    if math.isfinite(low):
        return f"{least} to {most}" if math.isfinite(high) else f"{least} or more"
    return f"at most {most}" if math.isfinite(high) else ""


def measured(
    says: str,
    *,
    unit: str = "",
    low: int | float = -math.inf,
    high: int | float = math.inf,
    missing: int | None = None,
    null: str = "",
    into: str = "",
    by_id: bool = False,
    low_on_top: bool = False,
    logarithmic: bool = False,
    default: Any = dataclasses.MISSING,
) -> Any:
    """A tensor field: what its numbers are, in which unit, between which bounds; see `Quantity`.

    `default=None` is for what only some settings measure.
    """
    quantity = Quantity(says, unit, low, high, missing, False, null, into, by_id, low_on_top, logarithmic)
    return dataclasses.field(default=default, metadata={"quantity": quantity})


def summed(says: str, *, default: Any = dataclasses.MISSING) -> Any:
    """A float64 field that `merge` adds, aligned by label; absent counts as 0."""
    return dataclasses.field(default=default, metadata={"quantity": Quantity(says, is_sum=True)})


class Derived(property):
    """A property with its quantity."""

    quantity: Quantity


def derived(
    says: str,
    *,
    unit: str = "",
    low: int | float = -math.inf,
    high: int | float = math.inf,
    missing: int | None = None,
    null: str = "",
    low_on_top: bool = False,
    logarithmic: bool = False,
) -> Callable[[Callable[[Any], T]], T]:
    """A quantity that is computed from the measured ones on access: a property with a declaration."""

    def declare(compute: Callable[[Any], T]) -> Any:
        found = Derived(compute)
        found.quantity = Quantity(
            says, unit, low, high, missing, null=null, low_on_top=low_on_top, logarithmic=logarithmic
        )
        return found

    return declare


@dataclass_transform(
    kw_only_default=True, frozen_default=True, eq_default=False, field_specifiers=(measured, summed, dataclasses.field)
)
class Declared:
    """Makes a frozen dataclass of every class that inherits from it."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)(cls)
        show_plain_fields(cls)


class Schema(NamedTuple):
    """What a result class declares: axes and quantities of its tensors by name, and its tables of labels.

    `headline`: the quantity of a table or a figure where none is named.
    """

    axes: dict[str, tuple[str, ...]]
    derived: dict[str, tuple[str, ...]]
    quantities: dict[str, Quantity]
    kind: dict[str, Kind]
    tables: dict[str, type[Table]]
    headline: str

    @property
    def every(self) -> dict[str, tuple[str, ...]]:
        """The axes of all quantities, measured and derived, in the order of their declaration."""
        return {**self.axes, **self.derived}

    def over(self, *axes: str) -> list[str]:
        """The quantities with exactly these axes."""
        return [name for name, own in self.every.items() if own == axes]


@cache
def schema(kind: type) -> Schema:
    """Read a result class's declarations once."""
    hints = get_type_hints(kind)
    axes = {name: dims for name, hint in hints.items() if (dims := axes_of(hint)) is not None}
    found = {
        name: attribute
        for cls in reversed(kind.__mro__)
        for name, attribute in vars(cls).items()
        if isinstance(attribute, property)
    }
    of_properties = {
        name: dims
        for name, attribute in found.items()
        if (dims := axes_of(get_type_hints(attribute.fget).get("return"))) is not None
    }
    declared = {field.name: field.metadata.get("quantity") for field in dataclasses.fields(kind)}
    quantities = {name: declared.get(name) or Quantity(name) for name in axes}
    quantities |= {name: getattr(found[name], "quantity", None) or Quantity(name) for name in of_properties}
    kinds: dict[str, Kind] = {
        name: "rows" if ROW_AXES & set(dims) else "sum" if quantities[name].is_sum else "constant"
        for name, dims in axes.items()
    }
    tables = {name: hint for name, hint in hints.items() if isinstance(hint, type) and issubclass(hint, Table)}
    every = {**axes, **of_properties}
    for name, dims in every.items():
        null = quantities[name].null
        if null and (null not in every or every[null] != dims[: len(every[null])]):
            raise TypeError(
                f"{kind.__name__}.{name}: null={null!r} must be the name of another quantity with the axes "
                f"[{' '.join(dims)}], or the first of them; the quantities are {', '.join(every)}: declare it"
            )
    first = next((name for name in every if not quantities[name].is_sum), next(iter(every), ""))
    return Schema(axes, of_properties, quantities, kinds, tables, getattr(kind, "headline", "") or first)


def axes_of(hint: Any) -> tuple[str, ...] | None:
    """The axis names of a jaxtyping annotation (an optional one too), None for any other annotation."""
    for option in (hint, *get_args(hint)):
        if hasattr(option, "dim_str"):
            return tuple(option.dim_str.split())
    return None
