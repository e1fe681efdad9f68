"""UnitActivation: how active is a unit at every token of a text?

    activation[layer, unit, token]  = a neuron's activation, a head's |z|, h[unit], or h . direction[unit]
    share_below[layer, unit, token] = the share of tokens with a lower activation, half of those with an equal one
                                                                                                            0 to 1

Activations are dimensionless, and each unit has a scale of its own. `share_below` compares a token with all tokens of
this run that are not special: the null is 0.5, its mean for every unit, however active. Among n tokens one must come
first, with 1 - 1 / 2n, so that a high share at one token of a short text is no finding; `MaxActivatingExamples` asks it
of a corpus. Units are those of that probe. Memory: 4 bytes per layer, unit and token, at most 1 GB.

Source: the view of a text of Bills et al. 2023, "Language models can explain neurons in language models",
openaipublic.blob.core.windows.net/neuron-explainer/paper/index.html.
"""

from collections.abc import Iterable, Sequence
from typing import Literal, Unpack

import pandas as pd
import plotly.graph_objects as go
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from lens_probes import figures
from lens_probes.directions import Directions, check_directions, hooks_of_units, named_units, units_at
from lens_probes.messages import brief
from lens_probes.model import ModelView
from lens_probes.model.hooks import ReadPoint
from lens_probes.probe import Probe
from lens_probes.reading import Reading
from lens_probes.result import Result, derived, measured
from lens_probes.settings import Layers, Units
from lens_probes.text.prompts import Tokens

LIMIT = 1e9  # bytes
DRAWN = 20  # units of a figure


class UnitActivationResult(Result):
    """Every unit's activation at every token."""

    headline = "activation"
    at: str
    layer: tuple[str, ...]
    unit: tuple[str, ...]
    token: Tokens
    activation: Float[Tensor, "layer unit token"] = measured("activation of the unit")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activation.nbytes > LIMIT:
            raise ValueError(
                f"activations must take at most {LIMIT / 1e9:.0f} GB; got {self.activation.nbytes / 1e9:.1f} GB: use "
                f"fewer layers, units or prompts, or MaxActivatingExamples"
            )

    @derived("share of tokens where the unit is less active", low=0, high=1)
    def share_below(self) -> Float[Tensor, "layer unit token"]:
        """Among the tokens that are not special; NaN without one, and where the activation is."""
        others = self.activation[..., ~self.token.special].contiguous().sort(-1).values
        values = self.activation.contiguous()
        below, up_to = (torch.searchsorted(others, values, right=right) for right in (False, True))
        return ((below + up_to) / (2 * others.shape[-1])).masked_fill(values.isnan(), torch.nan)

    def foremost(self) -> list[tuple[int, int]]:
        """Units that are far more active at one token than at most, in every layer in turn."""
        ranked = self._stands_out().argsort(dim=-1, descending=True, stable=True).T.tolist()
        return [(layer, unit) for units in ranked for layer, unit in enumerate(units)]

    def most_active(self, token: int | str, layer: int | str | None = None, prompt: int = 0) -> pd.DataFrame:
        """The units of a layer (the first), those first that are farthest above their usual activation at one token.

        `token`: a position, or a word that the prompt has once. `deviations`: how far, in standard deviations over the
        other tokens of this run that are not special; NaN with fewer than two of them.
        """
        row, at = self.token.row(prompt, token), 0 if layer is None else self.index_of("layer", layer)
        others = ~self.token.special
        others[row] = False
        values, usual = self.activation[at, :, row], self.activation[at][:, others]
        frame = pd.DataFrame(
            {
                "unit": self.unit,
                "activation": values.numpy(),
                "deviations": ((values - usual.mean(-1)) / usual.std(-1)).numpy(),
                "share_below": self.share_below[at, :, row].numpy(),
                "tokens": int(others.sum()),
            }
        )
        return frame.sort_values("deviations", ascending=False, kind="stable", ignore_index=True)

    def figure(
        self,
        layer: int | str | None = None,
        units: Sequence[int | str] | None = None,
        prompt: int = 0,
        **look: Unpack[figures.Look],
    ) -> go.Figure:
        """Units of a layer (the first) by tokens of a prompt; None: the twenty that stand out most at one token.

        Colours end at the largest value of a token that is not special: those of special tokens may be far larger.
        """
        row, tokens = 0 if layer is None else self.index_of("layer", layer), self.token.rows(prompt)
        if units is None:
            chosen = self._stands_out(prompt)[row].argsort(descending=True, stable=True)[:DRAWN].tolist()
        else:
            asked = list(units) if isinstance(units, Iterable) and not isinstance(units, str) else []
            if not asked:
                raise ValueError(f"units must be numbers or labels of units, such as [3, 5]; got {brief(units)}")
            chosen = [self.index_of("unit", unit) for unit in asked]
        values = self.activation[row, chosen][:, tokens]
        ordinary = values[:, ~self.token.special[tokens]]
        coloured, signed = ordinary if ordinary.numel() else values, bool((values < 0).any())
        return figures.small_grids(
            [("", values.tolist())],
            x=[f"{figures.visible(self.token.text[i], 14)} {self.token.position[i]}" for i in tokens],
            y=[self.unit[unit] for unit in chosen],
            title=self.title(f"Activation of units of layer {self.layer[row]}, prompt {prompt}"),
            x_title="token",
            y_title="unit",
            colour_title=self.quantity("activation").title,
            signed=signed,
            low=None if signed else float(coloured.min()),
            high=float(coloured.abs().max()),
            tokens=True,
            **look,
        )

    def conditions(self) -> str:
        """What the units are."""
        return self.at

    def _stands_out(self, prompt: int | None = None) -> Float[Tensor, "layer unit"]:
        """The largest activation above the mean, in standard deviations, over tokens that are not special."""
        counted = ~self.token.special if prompt is None else ~self.token.special & (self.token.prompt == prompt)
        values = self.activation[..., counted]
        if values.shape[-1] < 2:
            return torch.zeros(values.shape[:2])
        return ((values.amax(-1) - values.mean(-1)) / values.std(-1)).nan_to_num(0)


class UnitActivation(Probe[UnitActivationResult]):
    """The activation of neurons, heads, dimensions or directions at every token.

    `at`: neurons, heads (the length of a head's mixed values) or a read point, of which `units` are numbers (None:
    all). `directions`: vectors `[unit d_model]` that are multiplied with the states at a read point.

    >>> import lens_probes as lp
    >>> result = lp.UnitActivation(layers=[1], units=[3, 5]).run(lp.tiny.bridge(), "Time flies like an arrow.")
    >>> result.activation.shape == (1, 2, len(result.token)), result.unit
    (True, ('N3', 'N5'))
    """

    at: Literal["neuron", "head"] | ReadPoint = "neuron"
    units: Units | None = None
    directions: Directions | None = None
    layers: Layers = None

    def __post_init__(self) -> None:
        check_directions(self)

    def hooks(self, model: ModelView) -> dict[str, str]:
        """The component's activation in every layer."""
        return hooks_of_units(self, model)

    def measure(self, reading: Reading) -> UnitActivationResult:
        """Layer by layer."""
        every = torch.arange(len(reading.tokens))
        found = [units_at(self, reading, hook, every).cpu() for hook in reading.points.values()]
        reading.check_widths(each.shape[1] for each in found)
        return self.result(
            reading,
            unit=named_units(self, found[0].shape[1]),
            token=reading.tokens,
            activation=rearrange(torch.stack(found), "layer token unit -> layer unit token").contiguous(),
        )
