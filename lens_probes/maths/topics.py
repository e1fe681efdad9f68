"""Prompts by topic: permuted, resampled, and split into two parts.

Prompts are first sorted by topic and text, so that random draws do not depend on the order in which prompts were given.
A draw is a matrix of weights, `[topic prompt]`: how often each prompt counts in each topic.

What a test of topics shows. Prompts of a topic share words as well as a subject. "This unit distinguishes these topics"
holds for other prompts made like these; it does not say whether the unit responds to the subject or to the words. With
groups (templates), topics are permuted among whole cells of topic x group, within a group. A unit that responds to one
topic in one template only is then not significant, and p generalises to other templates. Intervals resample prompts
within cells: they hold for these topics and these templates. Without groups, everything holds for the mixture of
templates that the prompts have.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from lens_probes.maths import inference
from lens_probes.messages import brief
from lens_probes.text.prompts import PromptTable

MOST_UNEQUAL = 2  # largest ratio of prompts per cell: with 2 to 20, half of all units without an effect have p < 0.05
DRAWS_AT_ONCE = 16  # permutations or resamples in one product

Effect = Callable[[Float64[Tensor, "*draw topic prompt"]], Float[Tensor, "*draw unit"]]
"""A number per unit, given how often each prompt counts in each topic."""

Draws = Iterable[Float[Tensor, "_ topic prompt"]]
"""Permutations or resamples, in batches."""


class TopicEffect(NamedTuple):
    """An effect per unit: its value, its 95 % interval, and its values with permuted topics."""

    effect: Float[np.ndarray, " unit"]
    low: Float[np.ndarray, " unit"]
    high: Float[np.ndarray, " unit"]
    null: Float[np.ndarray, "permutation unit"]


class TopicOrder(NamedTuple):
    """Prompts sorted by topic and text, with the number of each prompt's topic and group.

    `order` is the index of each sorted prompt among the prompts as given.
    """

    order: Int[np.ndarray, " prompt"]
    topic: Int[np.ndarray, " prompt"]
    group: Int[np.ndarray, " prompt"] | None
    n_topics: int

    @property
    def members(self) -> Float64[Tensor, "topic prompt"]:
        """1 where a prompt has a topic, else 0."""
        return one_hot(self.topic, self.n_topics)

    @property
    def group_or_one(self) -> Int[np.ndarray, " prompt"]:
        """The group of each prompt; without groups, one group of all prompts."""
        return np.zeros(len(self.topic), dtype=np.int64) if self.group is None else self.group

    @property
    def cell(self) -> Int[np.ndarray, " prompt"]:
        """The number of each prompt's cell of topic x group. Cells are permuted whole; prompts, resampled within them.

        Cells are numbered by the topics' names, so that the order in which topics were given changes no draw.
        """
        _, start, place = np.unique(self.topic, return_index=True, return_inverse=True)
        return self.group_or_one * self.n_topics + np.argsort(np.argsort(start))[place]

    def permutations(self, number: int, *, seed: int) -> Iterator[Float64[Tensor, "draw topic prompt"]]:
        """Topics permuted at random among the cells of a group, or among prompts if there are no groups."""
        if not any(len(set(self.topic[self.group_or_one == each])) > 1 for each in set(self.group_or_one)):
            raise ValueError(
                "at least one group must have prompts of several topics; got one topic per group, so that topics "
                "cannot be permuted within it: pass other groups, or none"
            )
        self._check_sizes()
        item = np.arange(len(self.topic)) if self.group is None else self.cell
        _, start, item_of = np.unique(item, return_index=True, return_inverse=True)
        moved = inference.permuted(self.topic[start], self.group_or_one[start], number, seed=seed)[:, item_of]
        for first in range(0, number, DRAWS_AT_ONCE):
            yield torch.stack([one_hot(each, self.n_topics) for each in moved[first : first + DRAWS_AT_ONCE]])

    def _check_sizes(self) -> None:
        """Raise if cells of one topic are much smaller than those of another: the null would be too narrow."""
        _, first, sizes = np.unique(self.cell, return_index=True, return_counts=True)
        mean = [sizes[self.topic[first] == topic].mean() for topic in np.unique(self.topic)]
        if self.group is not None and max(mean) > MOST_UNEQUAL * min(mean):
            raise ValueError(
                f"topics must have about equally many prompts per group; got {min(mean):.1f} to {max(mean):.1f} on "
                f"average: pass equal numbers of prompts per topic, or no groups"
            )

    def resamples(self, *, seed: int) -> Iterator[Float64[Tensor, "draw topic prompt"]]:
        """Prompts drawn with replacement within cells; none if a topic has fewer than five, or a cell one."""
        if np.bincount(self.topic).min() >= inference.CLUSTERS_FOR_INTERVAL and self.sizes.min() > 1:
            times = torch.from_numpy(inference.resamples_within(self.cell, seed=seed))[:, None]
            yield from (self.members * some for some in times.split(DRAWS_AT_ONCE))

    def bounds(self, of_drawn: Float[np.ndarray, "draw unit"]) -> Float[np.ndarray, "bound unit"]:
        """The 95 % interval of a statistic, from its values over resamples."""
        return inference.bounds(of_drawn, int(self.sizes.min()), degrees=int((self.sizes - 1).sum()))

    def tested(
        self,
        effect: Effect,
        permutations: Draws,
        resamples: Draws,
        *,
        recentred: bool = False,
    ) -> TopicEffect:
        """An effect with its interval and its values with permuted topics."""
        found = effect(self.members).numpy()
        null = np.concatenate([effect(some).numpy() for some in permutations])
        low, high = self.interval(effect, resamples, recentred=recentred)
        return TopicEffect(found, low, high, null)

    def interval(self, effect: Effect, resamples: Draws, *, recentred: bool = False) -> Float[np.ndarray, "bound unit"]:
        """The 95 % interval of an effect; NaN without resamples.

        `recentred` shifts the mean of the resamples to the effect; for statistics whose mean, but not spread, is biased
        by resampling.
        """
        found, drawn = effect(self.members).numpy(), [effect(some).numpy() for some in resamples]
        if not drawn:
            return np.full((2, len(found)), np.nan)
        values = np.concatenate(drawn)
        return self.bounds(values - values.mean(axis=0) + found if recentred else values)

    @property
    def sizes(self) -> Int[np.ndarray, " cell"]:
        """The number of prompts of each cell."""
        return np.unique(self.cell, return_counts=True)[1]

    def first_part(self, fraction: float, *, seed: int) -> Bool[np.ndarray, " prompt"]:
        """Marks the prompts to choose on: whole groups, or without groups the same share of every topic."""
        if not 0 < fraction < 1:
            raise ValueError(
                f"fraction must be between 0 and 1, the share of the prompts to choose on; got {brief(fraction)}"
            )
        random = np.random.default_rng(seed)
        if self.group is None:
            first = np.zeros(len(self.topic), dtype=bool)
            for each in dict.fromkeys(self.topic.tolist()):  # prompts are sorted, so this is the order of the names
                members = random.permutation(np.flatnonzero(self.topic == each))
                first[members[: round(fraction * len(members))]] = True
        else:
            names = random.permutation(np.unique(self.group))
            first = np.isin(self.group, names[: round(fraction * len(names))])
        fewest = min(np.bincount(self.topic[part], minlength=self.n_topics).min() for part in (first, ~first))
        if fewest < 2:
            raise ValueError(
                f"both parts of the prompts must have two prompts or more per topic; got {fewest}: give each topic "
                f"more prompts (or more groups), or use another fraction"
            )
        return first


def by_topic(prompts: PromptTable, topics: Sequence[str], groups: Sequence[str] | None = None) -> TopicOrder:
    """Prompts sorted by topic and text. `groups`: one label per prompt (its template, its length), in the given order.

    >>> three, one = torch.arange(3), torch.ones(3, dtype=torch.int64)
    >>> table = PromptTable(three, text=("b", "a", "c"), topic=("x", "x", "y"), n_tokens=one, last_text=("b", "a", "c"))
    >>> by_topic(table, ["x", "y"]).order.tolist()
    [1, 0, 2]
    """
    if len(topics) < 2:
        raise ValueError(
            f"prompts must have two topics or more to compare; got {len(topics)}: pass them as "
            f"{{topic: [prompt, prompt, ...]}}"
        )
    if groups is not None and len(groups) != len(prompts):
        raise ValueError(f"groups must have one label per prompt, {len(prompts)}; got {len(groups)}")
    repeated = [text for text, times in Counter(zip(prompts.text, prompts.topic, strict=True)).items() if times > 1]
    if repeated:
        raise ValueError(
            f"each prompt must be given once; got {brief(repeated[0][0])} several times: remove the copies, which "
            f"would make p values too small"
        )
    order = np.lexsort((np.asarray(prompts.text), np.asarray(prompts.topic)))
    group = None if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1][order]
    return TopicOrder(order, topic_numbers(prompts, topics)[order], group, len(topics))


def topic_numbers(prompts: PromptTable, topics: Sequence[str]) -> Int[np.ndarray, " prompt"]:
    """The number of each prompt's topic."""
    return np.asarray([topics.index(topic) for topic in prompts.topic], dtype=np.int64)


def members(prompts: PromptTable, topics: Sequence[str]) -> Float64[Tensor, "topic prompt"]:
    """1 where a prompt has a topic, else 0."""
    return one_hot(topic_numbers(prompts, topics), len(topics))


def one_hot(topic: Int[np.ndarray, " prompt"], n_topics: int) -> Float64[Tensor, "topic prompt"]:
    """1 where a prompt has a topic, else 0."""
    return torch.nn.functional.one_hot(torch.from_numpy(topic), n_topics).T.double()


def own_less_others(weights: Float[Tensor, "*draw topic prompt"]) -> Float[Tensor, "*draw topic prompt"]:
    """Coefficients of each topic's mean minus the mean of the other topics' means; NaN for a topic without prompts.

    >>> own_less_others(torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))
    tensor([[ 0.5000,  0.5000, -1.0000],
            [-0.5000, -0.5000,  1.0000]])
    """
    shares = weights / weights.sum(-1, keepdim=True)
    return shares - (shares.sum(-2, keepdim=True) - shares) / (shares.shape[-2] - 1)
