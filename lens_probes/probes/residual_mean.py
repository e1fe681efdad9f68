"""ResidualMean: what is the mean state at a read point, and how large is it?

    mean[layer] = (1/n) sum over tokens of h[layer, token]                                      [layer d_model]
    share[layer] = |mean[layer]|^2 / ((1/n) sum over tokens of |h[layer, token]|^2)             0 to 1

Much of the residual stream is one direction shared by all tokens. A rank or a cosine that includes it says little about
a single token (Ethayarajh 2019, arXiv 1909.00512). Pass the result to `RankShift(center=...)` to subtract it. Special
tokens are excluded: the first token's state is often a hundred times longer than the rest (an attention sink). Memory
does not depend on the size of the corpus.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from lens_probes.model import ModelView, ReadPoint
from lens_probes.probe import Probe
from lens_probes.reading import Reading
from lens_probes.result import Result, derived, measured, summed
from lens_probes.settings import Layers


class ResidualMeanResult(Result):
    """Sums of states by layer, from which `mean` and `share` derive. Memory does not depend on the corpus."""

    headline = "share"
    at: ReadPoint
    layer: tuple[str, ...]
    total: Float64[Tensor, "layer d_model"] = summed("sum of the states of tokens that are not special")
    square: Float64[Tensor, " layer"] = summed("sum of the squared norms of the same states")
    count: Float64[Tensor, ""] = summed("number of these tokens")
    embed_mean: Float[Tensor, " d_model"] = measured("mean embedding, which identifies the model")

    @derived("mean state")
    def mean(self) -> Float[Tensor, "layer d_model"]:
        """The mean state."""
        return (self.total / self.count.clamp(min=1)).float()

    @derived("squared norm of the mean state / mean squared norm of states", low=0, high=1)
    def share(self) -> Float[Tensor, " layer"]:
        """The mean state's share of the mean squared norm, 0 to 1; about 1/n for n unrelated states."""
        return (self.count.clamp(min=1) * self.mean.double().square().sum(-1) / self.square).float()

    def of(self, model: ModelView, at: ReadPoint, layers: Sequence[int]) -> Float[Tensor, "layer d_model"]:
        """The mean states of these layers. Raises if they belong to another model or read point."""
        if not self.count:
            raise ValueError("center must have states; got special tokens only: run ResidualMean on more text")
        model.refuse_other("center", self.provenance, self.embed_mean)
        labels = [model.label(at, layer) for layer in layers]
        if at != self.at or not set(labels) <= set(self.layer):
            raise ValueError(
                f"center must have mean states at {at} ({labels[0]} to {labels[-1]}); got {self.at} ({self.layer[0]} "
                f"to {self.layer[-1]}): run ResidualMean(at={at!r}) on this model first"
            )
        return self.mean[[self.layer.index(label) for label in labels]]

    def conditions(self) -> str:
        """The read point."""
        return self.at


class ResidualMean(Probe[ResidualMeanResult]):
    """The mean state at a read point, by layer.

    >>> import lens_probes as lp
    >>> model = lp.tiny.bridge()
    >>> mean = lp.ResidualMean(at="resid_post").run(model, ["Time flies like an arrow.", "Fruit flies too."])
    >>> tuple(mean.mean.shape)
    (3, 32)
    >>> lp.RankShift(at="resid_post", center=mean).run(model, "Time flies.").rank.shape[0]
    3
    """

    at: ReadPoint = "resid_mid"
    layers: Layers = None

    def hooks(self, model: ModelView) -> dict[str, str]:
        """The read point of every layer."""
        return model.states(self.at, self.layers)

    def measure(self, reading: Reading) -> ResidualMeanResult:
        """Sums over the batch."""
        own, totals, squares = ~reading.tokens.special, [], []
        for hook in reading.points.values():
            states = reading[hook].cpu().double()[own]
            totals.append(states.sum(0))
            squares.append(states.square().sum())
        return self.result(
            reading,
            total=torch.stack(totals),
            square=torch.stack(squares),
            count=own.sum().double(),
            embed_mean=reading.model.embed_mean,
        )
