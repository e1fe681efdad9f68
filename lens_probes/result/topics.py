"""Results about prompts that have topics: their order, and the table of a test that permutes topics."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float64, Int
from torch import Tensor

from lens_probes.maths import topics as maths
from lens_probes.maths.topics import TopicOrder
from lens_probes.messages import brief
from lens_probes.result.base import Result
from lens_probes.result.comparison import comparison
from lens_probes.text.prompts import PromptTable

PERMUTED = "topics permuted among prompts, or among cells of topic x group within a group"


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
