"""Results about prompts that have topics: their order, and the table of a test that permutes topics."""

from collections.abc import Callable, Sequence
from typing import Any, TypedDict, Unpack

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor
from tqdm.auto import tqdm

from lens_probes import figures
from lens_probes.maths import inference
from lens_probes.maths import topics as maths
from lens_probes.maths.topics import TopicOrder
from lens_probes.messages import brief
from lens_probes.result.base import Result
from lens_probes.result.comparison import comparison
from lens_probes.result.schema import Quantity
from lens_probes.text.prompts import PromptTable

UNITS_AT_ONCE = 4096
COLUMNS = 21  # of a topic's grid: a layer has more neurons than can be drawn
PERMUTED = "topics permuted among prompts, or among cells of topic x group within a group"

UnitEffect = Callable[[Float[Tensor, "prompt unit"], Float[Tensor, "*draw topic prompt"]], Float[Tensor, "*draw unit"]]
"""A number per unit, given its values per prompt and how often each prompt counts in each topic."""


class Permuting(TypedDict, total=False):
    """The options of a test that permutes topics."""

    groups: Sequence[str] | None
    permutations: int
    seed: int
    progress: bool


class TopicResult(Result):
    """A result about prompts of several topics."""

    topic: tuple[str, ...]
    prompt: PromptTable

    def __post_init__(self) -> None:
        super().__post_init__()
        self.prompt.check_topics(self.topic)

    def by_topic(self, groups: Sequence[str] | None = None) -> TopicOrder:
        """The prompts sorted by topic and text, ready to be permuted and resampled; see `maths.topics`.

        `groups`: one label per prompt, in the order of `self.prompt`. Raises where topics cannot be compared: if there
        is one only, or a prompt comes twice.
        """
        return maths.by_topic(self.prompt, self.topic, groups)

    def members(self) -> Float64[Tensor, "topic prompt"]:
        """1 where a prompt is of a topic."""
        return maths.members(self.prompt, self.topic)

    def topic_blocks(self) -> tuple[Int[np.ndarray, " prompt"], list[str]]:
        """The prompts in the order of their topics, and the topic of each."""
        order = np.argsort(maths.topic_numbers(self.prompt, self.topic), kind="stable")
        return order, [self.prompt.topic[i] for i in order]

    def topic_number(self, topic: str) -> int:
        """Index of a topic on its axis."""
        if topic not in self.topic:
            raise ValueError(f"topic must be one of {', '.join(map(repr, self.topic))}; got {brief(topic)}")
        return self.topic.index(topic)

    def test_table(self, *axes: str, permutations: int, **columns: Any) -> pd.DataFrame:
        """The `comparison` of a test that permutes topics, one row per cell of these axes, with its counts."""
        return comparison(
            self.cells(*axes),
            **columns,
            prompts=len(self.prompt),
            topics=len(self.topic),
            permutations=permutations,
        )

    def test_units(
        self,
        values: Float[Tensor, "prompt unit"],
        effect: UnitEffect,
        order: TopicOrder,
        *,
        permutations: int,
        seed: int,
        progress: bool,
        says: str,
        null: str,
    ) -> pd.DataFrame:
        """The test of an effect on every unit (of all layers, laid end to end), some units at a time.

        `values` have their prompts in this order. `p` and `p_max` are about the absolute effect, `p_max` against the
        largest of all units, whose values must therefore be on one scale.
        """
        permuted = [draws.float() for draws in order.permutations(permutations, seed=seed)]
        resamples = [draws.float() for draws in order.resamples(seed=seed)]
        found, low, high, p, null_mean = np.empty((5, values.shape[1]))
        largest = np.zeros(permutations)
        starts = range(0, values.shape[1], UNITS_AT_ONCE)
        for start in tqdm(starts, desc="permuting", disable=not progress or len(starts) < 2):
            here = slice(start, start + UNITS_AT_ONCE)
            some = values[:, here].contiguous()
            found[here], low[here], high[here], drawn = order.tested(
                lambda weights, some=some: effect(some, weights.float()), permuted, resamples
            )
            null_mean[here], drawn = drawn.mean(axis=0), np.abs(drawn)
            p[here] = inference.one_sided_p(np.abs(found[here]), drawn)
            known = np.isfinite(found[here])  # a unit without a value is no maximum
            largest = np.maximum(largest, drawn[:, known].max(axis=1, initial=0))
        return self.test_table(
            "layer",
            "unit",
            effect=found,
            low=low,
            high=high,
            p=p,
            p_max=inference.one_sided_p(np.abs(found), largest[:, None]),
            null_mean=null_mean,
            permutations=permutations,
            says=says,
            null=null,
        )

    def draw_topics(
        self,
        values: Float[Tensor, "layer topic unit"],
        quantity: Quantity,
        title: str,
        *,
        across: str,
        **look: Unpack[figures.Look],
    ) -> go.Figure:
        """A grid of layers and units per topic, on one colour scale; one grid of topics for one unit per layer.

        `across` names the units. More than can be drawn are sorted, in each layer and topic anew, and thinned.
        """
        topics = [figures.named(topic) or "all prompts" for topic in self.topic]
        drawn: dict[str, Any] = {
            "title": self.title(title),
            "colour_title": quantity.title,
            "signed": quantity.low < 0 < quantity.high,
            **look,
        }
        x, x_title = self.labels("unit"), across
        if len(x) == 1:
            rows = values[:, :, 0].T.tolist()
            return figures.heatmap(rows, x=self.labels("layer"), y=topics, x_title="layer", y_title="topic", **drawn)
        if len(x) > COLUMNS:
            places = torch.linspace(0, len(x) - 1, COLUMNS).round().long()
            values = values.sort(dim=-1, descending=True).values[..., places]
            x = [f"{share:.0%}" for share in torch.linspace(0, 1, COLUMNS).tolist()]
            x_title = f"{across} of a layer, from the highest to the lowest"
        panels = [(topic, values[:, number].tolist()) for number, topic in enumerate(topics)]
        return figures.small_grids(panels, x=x, y=self.labels("layer"), x_title=x_title, y_title="layer", **drawn)
