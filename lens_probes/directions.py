"""Units of a layer as settings: neurons, heads, dimensions of a read point, or directions in their place.

A probe or experiment with such settings has `directions`, `units` and `at` among its fields.
"""

from typing import Annotated, Any

from jaxtyping import Float, Int
from torch import Tensor

from lens_probes.model import ModelView
from lens_probes.model.hooks import READ_POINTS
from lens_probes.reading import Reading
from lens_probes.settings import described

Directions = Annotated[Float[Tensor, "unit d_model"], described("a tensor [unit d_model] of floats")]


def check_directions(asked: Any) -> None:
    """Raise if directions are given beside units, or for an activation that is not of the residual stream."""
    if asked.directions is not None and (asked.at not in READ_POINTS or asked.units is not None):
        raise ValueError(
            f"{type(asked).__name__}(directions=...) must have units=None and a read point; got at={asked.at!r} and "
            f"units={asked.units!r}: pass at='resid_post' and leave units out"
        )


def directions_for(asked: Any, model: ModelView) -> Float[Tensor, "unit d_model"]:
    """A copy in float32 on the model's device, or an error if they do not fit the model."""
    given = asked.directions
    if given.ndim != 2 or given.shape[1] != model.d_model or not len(given):
        raise ValueError(
            f"{type(asked).__name__}(directions=...) must be a tensor [unit d_model] with d_model {model.d_model}; "
            f"got one of shape {tuple(given.shape)}"
        )
    along = given.detach().clone().float().to(model.device)
    if not along.isfinite().all():
        raise ValueError(f"{type(asked).__name__}(directions=...) must be finite; got NaN or Inf: check their source")
    return along


def hooks_of_units(asked: Any, model: ModelView) -> dict[str, str]:
    """The activation that holds the units in every layer that is asked; raises for directions that do not fit."""
    if asked.directions is not None:
        directions_for(asked, model)
    return {str(layer): model.hook_units(asked.at, layer) for layer in model.layers(asked.layers)}


def units_at(asked: Any, reading: Reading, hook: str, rows: Int[Tensor, " token"]) -> Float[Tensor, "token unit"]:
    """Every unit's activation at these tokens, in this order: of a head, the length of its mixed values."""
    activation = reading.at(hook, rows).float()
    if asked.directions is not None:
        activation = activation @ directions_for(asked, reading.model).T
    elif asked.at == "head":
        activation = activation.norm(dim=-1)
    if asked.units is not None:
        activation = activation[:, reading.model.units(asked.units, hook, activation.shape[1])]
    return activation


def named_units(asked: Any, n: int) -> tuple[str, ...]:
    """The labels of all n units, or of those that are asked: N3 a neuron, H3 a head, D3 any other."""
    short = {"neuron": "N", "head": "H"}.get(asked.at, "D")
    return tuple(f"{short}{unit}" for unit in (range(n) if asked.units is None else asked.units))
