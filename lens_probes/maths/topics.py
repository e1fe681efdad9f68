"""Prompts by topic: what is permuted, resampled, and split into halves.

Prompts are first put in an order of their own (topic, text), so what is drawn at random does not depend on how they
came. A draw is a matrix of weights, `[topic prompt]`: how often each prompt counts in each topic.

What a test of topics says. Prompts of a topic share words as well as a subject: "this unit tells these topics apart"
holds for other prompts made like these, and does not say whether subject or words do it. With groups (templates),
topics are permuted among whole cells of topic x group, within a group: a unit that answers to one topic in one template
only is no finding, and p speaks for other templates too. Intervals resample prompts within cells: they hold for these
topics and these templates. Without groups, everything holds for the mixture of templates that the prompts have.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from lens_probes.maths import inference
from lens_probes.text.prompts import PromptTable

MOST_UNEQUAL = 2  # times as many prompts per cell: with 2 to 20, half of all units without an effect have p < 0.05
DRAWS_AT_ONCE = 16  # permutations or resamples in one product


class TopicOrder(NamedTuple):
    """Prompts in their own order, with the numbers of their topics and of their groups."""

    order: Int[np.ndarray, " prompt"]
    topic: Int[np.ndarray, " prompt"]
    group: Int[np.ndarray, " prompt"] | None
    n_topics: int

    @property
    def members(self) -> Float64[Tensor, "topic prompt"]:
        """1 where a prompt is of a topic."""
        return one_hot(self.topic, self.n_topics)

    @property
    def group_or_one(self) -> Int[np.ndarray, " prompt"]:
        """The group of each prompt; one for all without groups."""
        return np.zeros(len(self.topic), dtype=np.int64) if self.group is None else self.group

    @property
    def cell(self) -> Int[np.ndarray, " prompt"]:
        """A number for every topic in every group: what is permuted whole, and resampled within.

        Topics count as they stand here, by name: numbered as they came, their order would change what is drawn.
        """
        _, start, place = np.unique(self.topic, return_index=True, return_inverse=True)
        return self.group_or_one * self.n_topics + np.argsort(np.argsort(start))[place]

    def permutations(self, number: int, *, seed: int) -> Iterator[Float64[Tensor, "draw topic prompt"]]:
        """Topics moved at random among the cells of a group, or among prompts if there are no groups."""
        if not any(len(set(self.topic[self.group_or_one == each])) > 1 for each in set(self.group_or_one)):
            raise ValueError("every group has prompts of one topic only: nothing can be permuted within groups")
        self._check_sizes()
        item = np.arange(len(self.topic)) if self.group is None else self.cell
        _, start, item_of = np.unique(item, return_index=True, return_inverse=True)
        moved = inference.permuted(self.topic[start], self.group_or_one[start], number, seed=seed)[:, item_of]
        for first in range(0, number, DRAWS_AT_ONCE):
            yield torch.stack([one_hot(each, self.n_topics) for each in moved[first : first + DRAWS_AT_ONCE]])

    def _check_sizes(self) -> None:
        """Refuse topics whose cells are always the small ones: large ones in their place make the null narrow."""
        _, first, sizes = np.unique(self.cell, return_index=True, return_counts=True)
        mean = [sizes[self.topic[first] == topic].mean() for topic in np.unique(self.topic)]
        if self.group is not None and max(mean) > MOST_UNEQUAL * min(mean):
            raise ValueError(
                f"topics are permuted within groups if their cells have about one size; got {min(mean):.1f} to "
                f"{max(mean):.1f} prompts per topic and group on average: take as many of every topic, or no groups"
            )

    def resamples(self, *, seed: int) -> Iterator[Float64[Tensor, "draw topic prompt"]]:
        """Prompts drawn with replacement within cells; none with a topic of fewer than five, or a cell of one."""
        if np.bincount(self.topic).min() >= inference.CLUSTERS_FOR_INTERVAL and self.sizes.min() > 1:
            times = torch.from_numpy(inference.resamples_within(self.cell, seed=seed))[:, None]
            yield from (self.members * some for some in times.split(DRAWS_AT_ONCE))

    def bounds(self, of_drawn: Float[np.ndarray, "draw unit"]) -> Float[np.ndarray, "bound unit"]:
        """The 95 % interval of a statistic, from its values over resamples."""
        return inference.bounds(of_drawn, int(self.sizes.min()), degrees=int((self.sizes - 1).sum()))

    @property
    def sizes(self) -> Int[np.ndarray, " cell"]:
        """How many prompts each cell has."""
        return np.unique(self.cell, return_counts=True)[1]

    def first_part(self, fraction: float, *, seed: int) -> Bool[np.ndarray, " prompt"]:
        """Which prompts are where something is chosen: whole groups, or the same share of every topic."""
        if not 0 < fraction < 1:
            raise ValueError(f"fraction is the share of the prompts to choose on, 0 to 1; {fraction} came")
        random = np.random.default_rng(seed)
        if self.group is None:
            first = np.zeros(len(self.topic), dtype=bool)
            for each in dict.fromkeys(self.topic.tolist()):  # by name, however topics came
                members = random.permutation(np.flatnonzero(self.topic == each))
                first[members[: round(fraction * len(members))]] = True
        else:
            names = random.permutation(np.unique(self.group))
            first = np.isin(self.group, names[: round(fraction * len(names))])
        fewest = min(np.bincount(self.topic[part], minlength=self.n_topics).min() for part in (first, ~first))
        if fewest < 2:
            raise ValueError(
                f"a part of the prompts would have {fewest} of a topic, and two are needed: give each topic more "
                f"prompts (or more groups), or take another fraction"
            )
        return first


def by_topic(prompts: PromptTable, topics: Sequence[str], groups: Sequence[str] | None = None) -> TopicOrder:
    """These prompts in their own order. `groups` is a label a prompt (its template, its length) in the given order.

    >>> three, one = torch.arange(3), torch.ones(3, dtype=torch.int64)
    >>> table = PromptTable(three, text=("b", "a", "c"), topic=("x", "x", "y"), n_tokens=one, last_text=("b", "a", "c"))
    >>> by_topic(table, ["x", "y"]).order.tolist()
    [1, 0, 2]
    """
    if len(topics) < 2:
        raise ValueError(
            "topics are compared and the prompts have fewer than two: pass them as {topic: [prompt, prompt, ...]}"
        )
    if groups is not None and len(groups) != len(prompts):
        raise ValueError(f"groups is one label a prompt: there are {len(prompts)}, and {len(groups)} came")
    repeated = [text for text, times in Counter(zip(prompts.text, prompts.topic, strict=True)).items() if times > 1]
    if repeated:
        raise ValueError(
            f"the prompt {repeated[0][0]!r} is there more than once, and counted as several it would make chance look "
            f"like a finding: give each prompt once"
        )
    order = np.lexsort((np.asarray(prompts.text), np.asarray(prompts.topic)))
    group = None if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1][order]
    return TopicOrder(order, topic_numbers(prompts, topics)[order], group, len(topics))


def topic_numbers(prompts: PromptTable, topics: Sequence[str]) -> Int[np.ndarray, " prompt"]:
    """The number of each prompt's topic."""
    return np.asarray([topics.index(topic) for topic in prompts.topic], dtype=np.int64)


def one_hot(topic: Int[np.ndarray, " prompt"], n_topics: int) -> Float64[Tensor, "topic prompt"]:
    """1 where a prompt is of a topic."""
    return torch.nn.functional.one_hot(torch.from_numpy(topic), n_topics).T.double()
