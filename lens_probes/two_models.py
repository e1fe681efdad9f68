"""What distinguishes two models: any probe's numbers of one minus those of another, on the same tokens.

    difference[..., row] = second[..., row] - first[..., row]      row: a token or a prompt of both runs
    effect[..., group]   = mean over the group's rows              in the unit of the quantity

The two share a tokenizer: a trained and an untrained model, one before and after fine-tuning, two checkpoints.
Intervals and p of tokens allow for prompts and for word types, those of prompts for prompts.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, Unpack

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float64

from lens_probes import figures
from lens_probes.maths import inference
from lens_probes.messages import brief
from lens_probes.result import Result
from lens_probes.result.comparison import comparison, paired
from lens_probes.result.schema import Quantity, schema
from lens_probes.text.prompts import PromptTable, Tokens

NULL = "both models have the same mean"
By = Literal["word_class", "topic"]


class Difference(NamedTuple):
    """One quantity of two models on the same rows; made by `difference`."""

    result: Result  # of the first model, whose labels are those of both
    name: str
    values: Float64[np.ndarray, "..."]
    rows: Tokens | PromptTable
    models: tuple[str, str]

    @property
    def quantity(self) -> Quantity:
        """What the numbers are: the quantity of one model minus that of the other, of any sign."""
        asked = self.result.quantity(self.name)
        return Quantity(f"{asked.says}, second model minus first", asked.unit)

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes before that of the rows."""
        return schema(type(self.result)).every[self.name][:-1]

    def test(self, by: By | None = None, *, weigh: inference.Weigh = "types") -> pd.DataFrame:
        """Mean differences with their intervals, p and q: one row per group of rows and cell of the other axes.

        `by`: "word_class" or "topic"; all rows are one group without it. Tokens: word types weigh equally unless
        `weigh="tokens"`, special tokens are left out, and the variance is that of prompts and types (see
        `inference.means`). Prompts: Student's t, and p from swapping the models at random, prompt by prompt. With fewer
        than five prompts or types there is no interval. `q` is the false-discovery rate over all rows.
        """
        labels = self.result.cells(*self.axes) if self.axes else pd.DataFrame(index=range(1))
        frames = [
            self._tested(labels if by is None else labels.assign(**{by: group}), member, weigh)
            for group, member in self._groups(by).items()
        ]
        table = pd.concat(frames, ignore_index=True)
        table["q"] = inference.false_discovery(table["p"].to_numpy())
        table.attrs.update(frames[0].attrs)
        return table

    def _tested(self, labels: pd.DataFrame, member: np.ndarray, weigh: inference.Weigh) -> pd.DataFrame:
        values, rows = self.values[..., member].reshape(-1, member.sum()), self.rows[torch.from_numpy(member)]
        says = self.quantity.title
        if not isinstance(rows, Tokens):
            known = values[:, ~np.isnan(values).any(axis=0)]
            return paired(labels, known, says=says, null=NULL, prompts=known.shape[1])
        table = inference.means(values, rows, weigh=weigh)
        effect, low, high, p = (table[name].to_numpy() for name in ("mean", "low", "high", "p"))
        counts = {name: table[name].to_numpy() for name in ("tokens", "words", "types", "prompts")}
        return comparison(labels, effect=effect, low=low, high=high, p=p, says=says, null=NULL, **counts)

    def word_types(self, layer: int | str = -1) -> pd.DataFrame:
        """The mean difference of each word type at one layer, the largest first: a list to look at, without a test."""
        if not isinstance(self.rows, Tokens):
            raise ValueError(f"word types need a number per token; got {self.name}, one per prompt: ask test()")
        values = self.values
        if self.axes:
            at = len(values) - 1 if layer == -1 else self.result.index_of("layer", layer)
            values = values[at]
        frame = pd.DataFrame({"type": inference.forms(self.rows), "difference": values, "prompt": self.rows.prompt})
        kept = frame[~self.rows.special.numpy()].dropna()
        table = kept.groupby("type").agg(
            difference=("difference", "mean"), tokens=("difference", "size"), prompts=("prompt", "nunique")
        )
        largest = np.argsort(-np.abs(np.asarray(table["difference"])), kind="stable")
        return table.iloc[largest].reset_index()

    def figure(self, by: By | None = None, **look: Unpack[figures.Look]) -> go.Figure:
        """Mean differences with 95 % intervals over layers, one line per group; or a grid of layers and heads.

        A star marks a cell of the grid with q < 0.05.
        """
        table = self.test(by)
        if self.axes == ("layer",):
            layers = self.result.labels("layer")
            groups = [(str(group), rows) for group, rows in table.groupby(by, sort=False)] if by else [("all", table)]
            names = [group for group, _ in groups]
            lines = [
                figures.Line(
                    group,
                    list(rows["effect"]),
                    list(rows["low"]),
                    list(rows["high"]),
                    figures.class_colour(group, names),
                )
                for group, rows in groups
            ]
            zero = figures.Line("no difference", [0.0] * len(layers), colour=figures.GREY, dashed=True)
            return figures.lines(
                {self.quantity.title: [*lines, zero]},
                layers,
                title=self._title(),
                x_title=figures.layer_title(layers),
                **look,
            )
        if by is None and len(self.axes) == 2 and self.axes[0] == "layer":
            return self.result.figure_test(table, **look)
        raise ValueError(
            f"a figure needs the axes [layer] or, for all rows together, [layer head]; got "
            f"[{' '.join(self.axes)}]{'' if by is None else f' by {by}'}: draw the table that test() returns"
        )

    def figure_prompt(self, prompt: int = 0, **look: Unpack[figures.Look]) -> go.Figure:
        """One prompt: layers across, tokens down."""
        if self.axes != ("layer",) or not isinstance(self.rows, Tokens):
            raise ValueError(f"figure_prompt needs a number per layer and token; got {self.name}: use figure()")
        rows, layers = self.rows.rows(prompt)[: figures.ROWS], self.result.labels("layer")
        return figures.heatmap(
            self.values[:, rows].T.tolist(),
            x=layers,
            y=[f"{figures.visible(self.rows.text[i], 14)} {self.rows.position[i]}" for i in rows],
            title=self._title(f", prompt {prompt}"),
            x_title=figures.layer_title(layers),
            y_title="token",
            colour_title=self.quantity.title,
            signed=True,
            **look,
        )

    def _title(self, of: str = "") -> str:
        first, second = self.models
        return self.result.title(
            f"{self.result.quantity(self.name).heading}{of}: difference of two models\n{second} minus {first}"
        )

    def _groups(self, by: By | None) -> dict[str, np.ndarray]:
        """Which rows are of each group."""
        kept = np.ones(len(self.rows), dtype=bool)
        if isinstance(self.rows, Tokens):
            kept = ~self.rows.special.numpy() & ~np.isnan(self.values.reshape(-1, len(self.rows))).all(axis=0)
        if by is None:
            groups = {"all": kept}
        else:
            label = _labels(self.rows, by)
            groups = {group: kept & (label == group) for group in dict.fromkeys(label) if group}
        groups = {group: member for group, member in groups.items() if member.any()}
        if not groups:
            raise ValueError(
                f"{'a row' if by is None else f'a row with a {by}'} must have a value in both models; got none: pass "
                f"longer prompts"
            )
        return groups


def _labels(rows: Tokens | PromptTable, by: By) -> np.ndarray:
    labels: Sequence[str] | None = getattr(rows, by, None) if by in ("word_class", "topic") else None
    if labels is None:
        raise ValueError(f"by must be 'topic', or for tokens 'word_class'; got {brief(by)}")
    return np.asarray(labels)


def difference(first: Result, second: Result, quantity: str | None = None) -> Difference:
    """One quantity of a probe on two models, aligned by token: `second` minus `first`.

    `first`, `second`: results of the same probe on the same prompts. `quantity`: one with a number per token or prompt;
    the first such unless another is named.

    >>> import lens_probes as lp
    >>> texts = lp.demo.sentences()[:8]
    >>> plain, other = (lp.LogitLens().run(lp.tiny.bridge(seed=seed), texts, progress=False) for seed in (0, 1))
    >>> found = lp.difference(plain, other, "log_prob")
    >>> list(found.test("word_class"))[:6]
    ['layer', 'word_class', 'effect', 'low', 'high', 'p']
    """
    if not isinstance(first, Result):
        raise TypeError(f"difference takes two results; got {brief(first)}: pass what a probe's run returned")
    first.check_comparable(second)
    every = schema(type(first)).every
    known = [
        name
        for name, axes in every.items()
        if axes[-1:] in (("token",), ("prompt",)) and getattr(first, name) is not None and not first.quantity(name).into
    ]
    if quantity not in (None, *known) or not known:
        raise ValueError(
            f"a difference needs a quantity with a number per token or prompt: {', '.join(known) or 'none'} of a "
            f"{type(first).__name__}; got {brief(quantity)}"
        )
    name = quantity or next(each for each in (schema(type(first)).headline, *known) if each in known)
    for axis in every[name][:-1]:
        if first.labels(axis) != second.labels(axis):
            raise ValueError(f"two models must have the same labels of axis {axis}; got others: pick layers= of both")
    models = first.provenance.model, second.provenance.model
    return Difference(first, name, second.known(name) - first.known(name), first.labels(every[name][-1]), models)
