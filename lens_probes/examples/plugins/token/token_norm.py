"""TokenNorm: how much longer does a token's state become on its way through the layers?

    ratio[layer, token] = |h_post[layer, token]| / |h_pre[0, token]|               at least 0, 1 is as long as at first

States of many models grow by some percent per layer, so that what is written late outshouts what was written early.
Source: Heimersheim & Turner 2023, "Residual stream norms grow exponentially over the forward pass",
alignmentforum.org/posts/8mizBCm3dyc432nK8; there the first token is left out of the averages, and so are special ones
in the figure here.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from lens_probes import Layers, LayerTokenResult, ModelView, Probe, Reading, measured
from lens_probes.result import Quantity, Shown


class TokenNormResult(LayerTokenResult):
    """The relative length of every state. It grows with the number of tokens."""

    ratio: Float[Tensor, "layer token"] = measured("length of the state / length of the first", low=0)

    def median(self) -> Float[Tensor, " layer"]:
        """Over the tokens that are not special; NaN if there are none."""
        own = self.ratio[:, ~self.token.special]
        return own.nanmedian(1).values if own.shape[1] else torch.full((len(own),), torch.nan)

    def shown(self) -> dict[str, Shown]:
        """What the page draws: what is declared, as always, and the median, which is not."""
        quantity = Quantity("median length of the state / length of the first", low=0)
        return super().shown() | {"median": Shown(quantity, ("layer",), self.median().double().numpy())}

    def findings(self) -> list[str]:
        """What the page begins with: the growth, then content words against function words, as always."""
        tokens, last = int((~self.token.special).sum()), self.layer[-1]
        grown = f"In {last} the median state is {self.median()[-1]:.2f} times as long as at first"
        own = [f"{grown} ({tokens} tokens; 1 is no growth)."] if tokens else []
        return [*own, *super().findings()]


class TokenNorm(Probe[TokenNormResult]):
    """The length of each layer's states relative to the first.

    >>> import lens_probes as lp
    >>> TokenNorm(layers=[0, 2]).run(lp.tiny.bridge(), "Time flies like an arrow.").layer
    ('0_post', '2_post')
    """

    layers: Layers = None

    def hooks(self, model: ModelView) -> list[str]:
        """The first state, and that after every layer."""
        return [model.hook("resid_pre", 0), *model.states("resid_post", self.layers).values()]

    def measure(self, reading: Reading) -> TokenNormResult:
        """Lengths of the batch."""
        after = reading.model.states("resid_post", self.layers)  # label -> hook: the layer axis
        first = reading[reading.model.hook("resid_pre", 0)].float()
        return self.result(reading, layer=tuple(after), ratio=relative(reading.stack(after.values()), first).cpu())


def relative(
    states: Float[Tensor, "layer token d_model"], first: Float[Tensor, "token d_model"]
) -> Float[Tensor, "layer token"]:
    """Lengths over those of the first states."""
    return states.norm(dim=-1) / first.norm(dim=-1)
