"""Results with one number per pair of tokens of a prompt: a query and a key."""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Unpack

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Float64, Shaped
from torch import Tensor

from lens_probes import figures
from lens_probes.maths import inference
from lens_probes.messages import amount, brief, interval
from lens_probes.result.base import Result
from lens_probes.result.schema import Quantity, derived, measured, schema, summed
from lens_probes.text.prompts import PairTable, Tokens

LIMIT = 1e9  # bytes of stored patterns
NO_PAIRS = PairTable(*torch.zeros(3, 0, dtype=torch.int64))


class PairResult(Result):
    """A result whose quantities are `[... pair]`: one number per query and key of a prompt.

    Pairs lie flat, so that prompts of all lengths share a tensor; `pattern` gives one prompt's `[query key]` back.
    Queries are tokens of `token`, and so are keys unless `keys` says otherwise.
    """

    token: Tokens
    pair: PairTable

    def __post_init__(self) -> None:
        super().__post_init__()
        self.pair.check_positions(self.token, self.keys())

    def keys(self) -> Tokens:
        """The tokens that are keys."""
        return self.token

    def pattern(self, prompt: int = 0, quantity: str | None = None) -> Shaped[Tensor, "*axes query key"]:
        """A quantity of one prompt as `[... query key]`; 0 where a query and a key are no pair of this result."""
        known = self._over_pairs()
        if quantity is not None and quantity not in known:
            raise ValueError(f"quantity must be one of {', '.join(known)}; got {brief(quantity)}")
        default = schema(type(self)).headline if schema(type(self)).headline in known else known[0]
        return self.unfold(getattr(self, default if quantity is None else quantity), prompt)

    def unfold(self, values: Shaped[Tensor, "*axes pair"], prompt: int) -> Shaped[Tensor, "*axes query key"]:
        """The same of any numbers with one entry per pair."""
        queries, keys = len(self.token.rows(prompt)), len(self.keys().rows(prompt))
        own = self.pair.prompt == prompt
        square = values.new_zeros(*values.shape[:-1], queries, keys)
        square[..., self.pair.query[own], self.pair.key[own]] = values[..., own]
        return square

    def draw_patterns(
        self,
        panels: Sequence[tuple[str, Shaped[Tensor, "row key"]]],
        prompt: int,
        question: str,
        *,
        quantity: str,
        rows: Sequence[str] | None = None,
        x_title: str = "key",
        y_title: str = "query",
        highest: float | None = None,
        **look: Unpack[figures.Look],
    ) -> go.Figure:
        """Grids of a quantity over a prompt's tokens, side by side; `rows` names them unless they are its tokens.

        Colours end at the quantity's bounds, or at `highest`.
        """
        drawn = self.quantity(quantity)
        signed = drawn.low < 0 < drawn.high
        keys = self.keys()
        texts = [f"{figures.visible(keys.text[row], 14)} {n}" for n, row in enumerate(keys.rows(prompt))]
        return figures.small_grids(
            [(name, values.tolist()) for name, values in panels],
            x=texts,
            y=texts if rows is None else rows,
            title=self.title(question),
            x_title=x_title,
            y_title=y_title,
            colour_title=drawn.title,
            signed=signed,
            low=None if signed else drawn.low,
            high=None if signed else drawn.high if highest is None else highest,
            tokens=True,
            **look,
        )

    def _over_pairs(self) -> list[str]:
        declared = schema(type(self)).every
        return [name for name, axes in declared.items() if axes[-1:] == ("pair",) and getattr(self, name) is not None]


class PatternResult(PairResult):
    """Statistics of attention patterns as sums over queries, and the patterns themselves if they were kept.

    A subclass declares what each statistic is, the axes of the three sums, which begin with `statistic`, and how a run
    is written that keeps patterns, and one that does not.
    """

    headline = "mean"
    quantities: ClassVar[Mapping[str, Quantity]]
    keeping: ClassVar[str]
    not_keeping: ClassVar[str]
    layer: tuple[str, ...]
    head: tuple[str, ...]
    statistic: tuple[str, ...]
    queries: Tensor
    total: Tensor
    uniform_total: Tensor
    prompts: Float64[Tensor, " statistic"] = summed("number of prompts with queries that count")
    queries_square: Float64[Tensor, " statistic"] = summed("squared number of a prompt's queries, summed over prompts")
    total_square: Float64[Tensor, "statistic layer head"] = summed("squared sum of a prompt, summed over prompts")
    total_queries: Float64[Tensor, "statistic layer head"] = summed("sum x queries of a prompt, summed over prompts")
    attention: Float[Tensor, "layer head pair"] | None = measured("attention weight", low=0, high=1, default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attention is not None and self.attention.nbytes > LIMIT:
            raise ValueError(
                f"patterns must take at most {LIMIT / 1e9:.0f} GB; got {self.attention.nbytes / 1e9:.1f} GB: use fewer "
                f"layers or prompts, or run {self.not_keeping}"
            )

    @derived("mean over queries", low=0, null="uniform")
    def mean(self) -> Float[Tensor, "statistic layer head"]:
        """Each statistic's mean over queries; NaN where no query counts."""
        return (self._of_all(self.total) / self._of_all(self.queries)[:, None, None]).float()

    @derived("mean over queries under uniform attention", low=0)
    def uniform(self) -> Float[Tensor, " statistic"]:
        """`mean` of a head that attends uniformly to all keys that a query may attend to."""
        return (self._of_all(self.uniform_total) / self._of_all(self.queries)).float()

    def interval_of(self, statistic: str) -> Float64[np.ndarray, "bound layer head"]:
        """The 95 % interval of one statistic's mean over queries, by its differences between prompts.

        With a prompt's sum T over n queries, P prompts, and r = sum T / sum n, the squared standard error is
        P / (P - 1) sum (T - r n)^2 / (sum n)^2, with Student's t; it ends where the statistic's range does. NaN with
        fewer than five prompts.
        """
        at = self._index(statistic)
        n, prompts = self._of_all(self.queries)[at], int(self.prompts[at])
        mean = self._of_all(self.total)[at] / n
        squares = self.total_square[at] - 2 * mean * self.total_queries[at] + mean**2 * self.queries_square[at]
        error = (squares.clamp(min=0) * (prompts / max(prompts - 1, 1))).sqrt() / n
        low, high, _ = inference.student(mean.flatten().numpy(), error.flatten().numpy(), prompts)
        bounds = self.quantities[statistic]
        return np.stack([low, high]).reshape(2, *mean.shape).clip(bounds.low, bounds.high)

    def by_head(self, statistic: str) -> pd.DataFrame:
        """Every head's mean of a statistic with its 95 % interval, the highest first.

        `null`: its value under uniform attention.
        """
        at, (low, high) = self._index(statistic), self.interval_of(statistic)
        values = {"mean": self.mean[at], "low": low, "high": high}
        frame = self.cells("layer", "head").assign(
            **{name: np.asarray(each).ravel() for name, each in values.items()},
            null=float(self.uniform[at]),
            queries=int(self._of_all(self.queries)[at]),
            prompts=int(self.prompts[at]),
        )
        return frame.sort_values("mean", ascending=False, kind="stable", ignore_index=True)

    def highest(self, statistic: str) -> str:
        """The head with the highest mean of a statistic, in words: its mean with interval and n, and the null."""
        first = self.by_head(statistic).to_dict("records")[0]
        return (
            f"L{first['layer']}{first['head']}, with {first['mean']:.2f} ({interval(first['low'], first['high'])}; "
            f"{amount(first['queries'], 'query', 'queries')} of {amount(first['prompts'], 'prompt')}). "
            f"The null, uniform attention: {first['null']:.2f}."
        )

    def _of_all(self, sums: Shaped[Tensor, "statistic *axes"]) -> Shaped[Tensor, "statistic *fewer"]:
        """One of the three sums, over all queries: `[statistic]` or `[statistic layer head]`."""
        return sums

    def foremost(self) -> list[tuple[int, int]]:
        """The head with the highest mean of each statistic, first that of the finding."""
        best = self.mean.nan_to_num(-1).flatten(1).argmax(1).tolist()
        return [divmod(cell, len(self.head)) for cell in best]

    def mean_of(self, statistic: str) -> Float[Tensor, "layer head"]:
        """One statistic's mean over queries."""
        return self.mean[self._index(statistic)]

    def _index(self, statistic: str) -> int:
        """Index of a statistic on its axis."""
        if statistic not in self.statistic:
            raise ValueError(f"statistic must be one of {', '.join(self.statistic)}; got {brief(statistic)}")
        return self.statistic.index(statistic)

    def pattern(self, prompt: int = 0, quantity: str | None = None) -> Float[Tensor, "layer head query key"]:
        """The attention pattern of one prompt, 0 where a query cannot attend to a key."""
        if self.attention is None:
            raise ValueError(f"pattern needs stored patterns; got sums only: run {self.keeping}")
        return super().pattern(prompt, quantity)

    def draw_statistic(self, statistic: str, about: str = "", **look: Unpack[figures.Look]) -> go.Figure:
        """One statistic by layer and head, and uniform attention as the last column; the title says `about` what."""
        at, quantity = self._index(statistic), self.quantities[statistic]
        question = quantity._replace(says=f"{about}{quantity.says}").heading
        notes = f"null: uniform attention, {self.uniform[at]:.2f}; {int(self._of_all(self.queries)[at]):,} queries"
        title, null = self.title(f"{question} ({notes})"), ("null", self.uniform[at])
        return self.draw_grid(self.mean[at], quantity, title, null=null, **look)


def spread(queries: Float64[Tensor, " statistic"], total: Float64[Tensor, "statistic layer head"]) -> dict[str, Tensor]:
    """What `interval_of` needs of one prompt, from its number of queries and its sum over them."""
    return {
        "prompts": (queries > 0).double(),
        "queries_square": queries**2,
        "total_square": total**2,
        "total_queries": total * queries[:, None, None],
    }


def added(sums: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The sums of prompts, added up by name."""
    return {name: torch.stack([each[name] for each in sums]).sum(0) for name in sums[0]}
