"""EmbeddingDensity: how crowded is the vocabulary around a token's embedding?

    density[token] = mean over the k entries nearest to w[id] (itself excluded) of cos(w[id], w[v])        -1 to 1

No activation is read: it is a fact about the embedding. A published guess says that content words live in denser
regions than function words ("Paying Attention, Part 2", github.com/danavery/attention-encodings); work on inverting
models says the opposite of frequent function words (arXiv 2510.15511 and after). Words are compared as types: `the`
counts once however often it was said. Frequency is the obvious rival explanation: see `compare(strata=...)`.
"""

from dataclasses import dataclass, field
from typing import final

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_probes import figures
from lens_probes.maths import inference
from lens_probes.maths.vocabulary import nearest
from lens_probes.model import ModelView
from lens_probes.probe import Probe
from lens_probes.reading import Reading
from lens_probes.result import Result, amount, unit
from lens_probes.text.prompts import Tokens


@final
@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class EmbeddingDensityResult(Result):
    """Local density of each token's embedding. It grows with the number of tokens, a number each."""

    token: Tokens
    density: Float[Tensor, " token"] = field(metadata=unit("mean cosine with the k nearest embeddings", low=-1, high=1))

    def by_word_class(self) -> pd.DataFrame:
        """Types by word class: n, median, quartiles and interval of the median, which allows for other words."""
        return inference.describe_types(self._values_by_unit(), self.token).drop(columns="unit")

    def compare(
        self,
        first: str = "content",
        second: str = "function",
        *,
        strata: inference.Strata | None = None,
        permutations: int = inference.PERMUTATIONS,
        seed: int = 0,
    ) -> pd.DataFrame:
        """The probability that a type of class `first` lies in a denser region than one of `second`, with p and n.

        Types are compared, each counted once; ids that occur in both classes are left out. See
        `inference.compare_types`.
        """
        return inference.compare_types(
            self._values_by_unit(),
            self.token,
            first,
            second,
            strata=strata,
            permutations=permutations,
            seed=seed,
        ).drop(columns="unit")

    def _values_by_unit(self) -> inference.Values:
        return self.density[None].double().numpy()

    def figure(self) -> go.Figure:
        """Median density by word class, with the 95 % interval."""
        table = self.by_word_class()
        columns = (list(table[name]) for name in ("word_class", "median", "low", "high", "types"))
        rows = list(zip(*columns, strict=True))
        return figures.bars(
            {name: (median, low, high) for name, median, low, high, _ in rows},
            notes={name: amount(types, "type") for name, *_, types in rows},
            title=f"How crowded is the embedding around a word?\n{self.provenance.describe()}",
            y_title="mean cosine with the nearest (-1 to 1)",
        )


@final
@dataclass(frozen=True)
class EmbeddingDensity(Probe[EmbeddingDensityResult]):
    """Mean cosine of a token's embedding with its k nearest in the vocabulary.

    >>> import lens_probes as lp
    >>> result = lp.EmbeddingDensity(k=3).run(lp.tiny.bridge(), "Time flies like an arrow.")
    >>> result.density.shape == result.token.id.shape
    True
    """

    k: int = 10

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"EmbeddingDensity(k=...) is a number of neighbours, at least 1; {self.k} came")

    def hooks(self, model: ModelView) -> list[str]:
        """None: it reads the embedding only."""
        if self.k >= model.d_vocab:
            raise ValueError(
                f"EmbeddingDensity(k={self.k}) needs more than {self.k} entries and {model.name} has {model.d_vocab}"
            )
        return []

    def measure(self, reading: Reading) -> EmbeddingDensityResult:
        """Each id once."""
        ids, place = reading.tokens.id.unique(return_inverse=True)
        W_E = reading.model.W_E
        return EmbeddingDensityResult(
            token=reading.tokens, density=density(ids.to(W_E.device), W_E, self.k).cpu()[place]
        )


def density(ids: Int[Tensor, " row"], vocabulary: Float[Tensor, "vocab d_model"], k: int) -> Float[Tensor, " row"]:
    """Mean cosine of each id's vector with the k nearest others; an equal vector of another id is one of them.

    >>> density(torch.tensor([0]), torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), 2)
    tensor([0.5000])
    """
    found, cosines = nearest(vocabulary[ids], vocabulary, k + 1)
    other = found != ids[:, None]
    # The id itself is among its k + 1 nearest unless more than k equal it; then the last of them stands in for it.
    other[:, -1] &= ~other.all(dim=1)
    return torch.where(other, cosines, 0.0).sum(1) / k
