"""What an error shows of a value: what was written if that is short, and never a model, a tensor or a table."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import lens_probes as lp
from lens_probes.examples import tiny
from lens_probes.messages import brief


@pytest.mark.parametrize(
    "value", ["a text", 3, 2.5, None, [1, 2], ("it", 4), {"a": 1}, np.float64(0.5), lp.ResidualUpdate()]
)
def test_what_is_short_is_shown_as_it_is_written(value: object) -> None:
    assert brief(value) == repr(value)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (torch.zeros(1000, 1000), "<Tensor of shape (1000, 1000)>"),
        (np.zeros((1000, 3)), "<ndarray of shape (1000, 3)>"),
        (pd.DataFrame({"a": range(99)}), "<DataFrame of shape (99, 1)>"),
        ([torch.nn.Linear(2, 2)], "[<Linear>]"),
        ({"a": (torch.nn.Linear(2, 2),)}, "{'a': (<Linear>,)}"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_modules_and_arrays_are_named_at_any_depth(value: object, shown: str) -> None:
    assert brief(value) == shown


def test_what_is_long_is_cut() -> None:
    for value in ("a" * 10**6, list(range(10**6)), ["a" * 10**4] * 9, lp.LogitLens(target=tuple(range(10**4)))):
        assert len(brief(value)) < 600


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    "ask",
    [
        lambda model: lp.RankShift(metric=model),
        lambda model: lp.ResidualMean(at=model).run(model, "one two"),
        lambda model: lp.LogitLens(target=model),
        lambda model: lp.LogitLens(translator=[model]),
        lambda model: lp.DirectLogitAttribution(target=[model]),
        lambda model: lp.TopicActivity(component=model),
        lambda model: lp.TopicActivity(pool=model),
        lambda model: lp.HeadTopicSimilarity(component=model),
        lambda model: lp.TunedLens(steps=1).run(model, "one two", resume=model, progress=False),
        lambda model: lp.TopicAblation(component=model),
        lambda model: lp.TiedKeyValue(at=model),
        lambda model: lp.HeadAblation(statistic=model),
        lambda model: lp.InputReconstruction(0, method=model),
        lambda model: lp.AttentionPatterns().run(model, "one two").figure_heads([model]),
        lambda model: lp.read_vector(model, torch.ones(2, 32), names=[model]),
    ],
)
def test_a_model_in_the_place_of_a_setting_is_named_and_not_printed(ask: Callable[[Any], Any]) -> None:
    with pytest.raises((TypeError, ValueError), match="<TransformerBridge>") as caught:
        ask(tiny.bridge())
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)
