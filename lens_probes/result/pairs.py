"""Results with one number per pair of tokens of a prompt: a query and a key."""

from collections.abc import Sequence
from typing import Unpack

import plotly.graph_objects as go
from jaxtyping import Shaped
from torch import Tensor

from lens_probes import figures
from lens_probes.messages import brief
from lens_probes.result.base import Result
from lens_probes.result.schema import schema
from lens_probes.text.prompts import PairTable, Tokens


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
