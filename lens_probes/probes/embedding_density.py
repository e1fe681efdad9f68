"""EmbeddingDensity: how dense is the vocabulary around a token's embedding?

    density[token] = mean over the k entries nearest to w[id] (itself excluded) of cos(w[id], w[v])        -1 to 1

It reads W_E only. "Paying Attention, Part 2" (github.com/danavery/attention-encodings) conjectures that content words
lie in denser regions than function words; work on inverting models says the opposite of frequent function words (arXiv
2510.15511 and after). Words are compared as types: `the` counts once. Frequency is the main confounder: control for it
with `compare(strata=...)`.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_probes.maths.vocabulary import nearest
from lens_probes.model import ModelView
from lens_probes.probe import Probe
from lens_probes.reading import Reading
from lens_probes.result import TokenResult, measured
from lens_probes.settings import Positive


class EmbeddingDensityResult(TokenResult):
    """Local density of each token's embedding: one number per token."""

    density: Float[Tensor, " token"] = measured("mean cosine with the nearest embeddings", low=-1, high=1, by_id=True)


class EmbeddingDensity(Probe[EmbeddingDensityResult]):
    """Mean cosine of a token's embedding with its k nearest in the vocabulary.

    >>> import lens_probes as lp
    >>> result = lp.EmbeddingDensity(k=3).run(lp.tiny.bridge(), "Time flies like an arrow.")
    >>> result.density.shape == result.token.id.shape
    True
    """

    k: Positive = 10

    def hooks(self, model: ModelView) -> list[str]:
        """None: the probe reads the embedding only."""
        if self.k >= model.d_vocab:
            raise ValueError(
                f"EmbeddingDensity(k=...) must be below {model.d_vocab}, the size of the vocabulary; got {self.k}"
            )
        return []

    def measure(self, reading: Reading) -> EmbeddingDensityResult:
        """Compute the density of each id once."""
        ids, place = reading.tokens.id.unique(return_inverse=True)
        W_E = reading.model.W_E
        return self.result(reading, density=density(ids.to(W_E.device), W_E, self.k).cpu()[place])


def density(ids: Int[Tensor, " row"], vocabulary: Float[Tensor, "vocab d_model"], k: int) -> Float[Tensor, " row"]:
    """Mean cosine of each id's vector with the k nearest others; equal vectors of other ids count among them.

    >>> density(torch.tensor([0]), torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), 2)
    tensor([0.5000])
    """
    found, cosines = nearest(vocabulary[ids], vocabulary, k + 1)
    other = found != ids[:, None]
    # An id is among its own k + 1 nearest unless more than k others equal it; then the last one is left out instead.
    other[:, -1] &= ~other.all(dim=1)
    return torch.where(other, cosines, 0.0).sum(1) / k
