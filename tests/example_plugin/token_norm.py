"""TokenNorm: how much longer does a token's state become on its way through the layers?

    ratio[layer, token] = |h_post[layer, token]| / |h_pre[0, token]|               at least 0, 1 is as long as at first

States of many models grow by some percent a layer, so that what is written late outshouts what was written early.
Source: Heimersheim & Turner 2023, "Residual stream norms grow exponentially over the forward pass",
alignmentforum.org/posts/8mizBCm3dyc432nK8; there the first token is left out of the averages, and so are special ones
in the figure here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from lens_probes import ModelView, Probe, Reading, Result, Tokens, figures
from lens_probes.result import unit


@final
@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class TokenNormResult(Result):
    """The relative length of every state. It grows with the number of tokens."""

    layer: tuple[str, ...]
    token: Tokens
    ratio: Float[Tensor, "layer token"] = field(metadata=unit("length of the state over that of the first", low=0))

    def figure(self) -> go.Figure:
        """The median over tokens, special ones left out, by layer."""
        median = self.ratio[:, ~self.token.special].nanmedian(dim=1).values
        return figures.lines(
            {"length / first length": [figures.Line("median token", median.tolist())]},
            self.layer,
            title=f"How much longer do states become?\n{self.provenance.describe()}",
            x_title="state",
        )


@final
@dataclass(frozen=True)
class TokenNorm(Probe[TokenNormResult]):
    """The length of each layer's states relative to the first.

    >>> import lens_probes as lp
    >>> TokenNorm(layers=[0, 2]).run(lp.tiny.bridge(), "Time flies like an arrow.").layer
    ('0_post', '2_post')
    """

    layers: Sequence[int] | None = None

    def hooks(self, model: ModelView) -> list[str]:
        """The first state, and the last of every layer."""
        return [model.hook("resid_pre", 0), *(model.hook("resid_post", layer) for layer in model.layers(self.layers))]

    def measure(self, reading: Reading) -> TokenNormResult:
        """Lengths of the batch."""
        first, *after = [reading[hook].float().norm(dim=-1).cpu() for hook in self.hooks(reading.model)]
        return TokenNormResult(
            layer=tuple(reading.model.label("resid_post", layer) for layer in reading.model.layers(self.layers)),
            token=reading.tokens,
            ratio=relative(first, torch.stack(after)),
        )


def relative(first: Float[Tensor, " token"], lengths: Float[Tensor, "layer token"]) -> Float[Tensor, "layer token"]:
    """Lengths over the first ones."""
    return lengths / first
